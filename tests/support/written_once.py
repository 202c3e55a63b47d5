"""A check in Triton's interpreter: no byte is written by two programs of a launch.

On a GPU that would be a race.
"""

from contextlib import contextmanager
from importlib import import_module

import numpy as np
import pytest


@contextmanager
def written_once():
    """Fails at the end of a launch in which two programs wrote one byte, be it the same value.

    One program may write it twice.
    """
    interpreter = import_module("triton.runtime.interpreter")
    builder = interpreter.interpreter_builder
    store, call = type(builder).create_masked_store, interpreter.GridExecutor.__call__
    stores = []  # of the launch that runs: (addresses, bytes of each, program)

    def recorded_store(self, pointers, value, mask, *modifiers):
        addresses, mask = np.broadcast_arrays(pointers.data, mask.data)
        stores.append((addresses[mask], value.data.dtype.itemsize, program_of(self)))
        return store(self, pointers, value, mask_like(mask, pointers), *modifiers)

    def mask_like(mask, pointers):
        return interpreter.TensorHandle(
            np.broadcast_to(mask, pointers.data.shape), interpreter.tl.int1
        )

    def checked_call(self, *arguments, **options):
        stores.clear()
        call(self, *arguments, **options)
        assert not (twice := bytes_of_several(stores)), (
            f"{self.fn.__name__}: several programs write each of {twice} bytes"
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(builder), "create_masked_store", recorded_store)
        patch.setattr(interpreter.GridExecutor, "__call__", checked_call)
        yield


def program_of(builder):
    """The number of the program that runs, in a grid of up to three dimensions."""
    (x, y, z), (_, in_y, in_z) = builder.grid_idx, builder.grid_dim
    return (x * in_y + y) * in_z + z


def bytes_of_several(stores):
    """How many bytes are in the stores of more than one program."""
    if not stores:
        return 0
    piece = min(width for _, width, _ in stores)  # wider numbers lie at multiples of it
    written = [
        (addresses[:, None] + np.arange(0, width, piece, dtype=np.uint64)).ravel()
        for addresses, width, _ in stores
    ]
    programs = np.repeat(
        [program for *_, program in stores], [len(addresses) for addresses in written]
    ).astype(np.uint64)
    places = np.concatenate(written).astype(np.uint64)
    # 2²⁴ programs, 2⁴⁰ bytes
    pairs = np.unique((places - places.min()) << np.uint64(24) | programs)
    return piece * (len(pairs) - len(np.unique(pairs >> np.uint64(24))))
