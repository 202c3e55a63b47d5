"""V-MoE's sharded msgpack checkpoints of the official JAX code, read into numpy arrays, whole or in
part.

Sizes in a file are claims: nothing is allocated before they agree with the bytes at hand, and
nothing is unpickled. The files have no checksums: a bit changed inside a weight or a name cannot be
noticed.
"""

import os
from functools import partial

import numpy as np

from ironmoe.moe.checkpoints.stored_array import StoredArray
from ironmoe.moe.checkpoints.vmoe_data import StoredPart, find_parts
from ironmoe.moe.checkpoints.vmoe_format import Box, box_slices, shard_file
from ironmoe.moe.checkpoints.vmoe_index import read_index


def read_vmoe_checkpoint(prefix: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read ``<prefix>.index`` and its ``<prefix>.data-00000-of-0000n``, written by the official
    V-MoE code.

    prefix: the common beginning of the files' names; with ``.index`` at its end it is taken too.

    Returns flax paths joined by "/", such as "Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel", in
    the order of the leaves, to arrays in their stored shape and dtype; bfloat16 becomes float32,
    exactly. A "params" that is the only root is left out of the paths.

    Source: vmoe/checkpoints of github.com/google-research/vmoe.

    CheckpointError: a file is missing, truncated, corrupt or foreign.
    ImportError: msgpack is not installed.
    """
    files = _DataFiles(prefix)
    files.check_all()
    return {name: array[...] for name, array in files.arrays().items()}


def open_vmoe_checkpoint(prefix: str | os.PathLike[str]) -> dict[str, StoredArray]:
    """What ``read_vmoe_checkpoint`` reads, as arrays that are read where they are indexed.

    ``array[2:4]`` reads two experts, and no more: of a data file the headers, once, and then the
    bytes of these experts. So a process can take its share of a checkpoint that it could not hold.

    CheckpointError, ImportError: as ``read_vmoe_checkpoint``. What is wrong in a data file is found
    when an array is read that has a part in it.
    """
    return _DataFiles(prefix).arrays()


class _DataFiles:
    """The data files of a checkpoint. The headers of each are read once, when it is needed."""

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.base = os.fspath(prefix).removesuffix(".index")
        self.leaves, self.count = read_index(self.base)
        self.parts: dict[int, dict[int, list[StoredPart]]] = {}

    def arrays(self) -> dict[str, StoredArray]:
        root = "params/" if all(leaf.path.startswith("params/") for leaf in self.leaves) else ""
        return {
            leaf.path.removeprefix(root): StoredArray(
                leaf.shape, leaf.dtype, partial(self._read, number)
            )
            for number, leaf in enumerate(self.leaves)
        }

    def check_all(self) -> None:
        """CheckpointError unless each data file has the parts that the index promises."""
        for shard in sorted({shard for leaf in self.leaves for shard in leaf.shard_of.values()}):
            self._parts_in(shard)

    def _parts_in(self, shard: int) -> dict[int, list[StoredPart]]:
        if shard not in self.parts:
            file = shard_file(self.base, shard, self.count)
            self.parts[shard] = find_parts(file, shard, self.leaves)
        return self.parts[shard]

    def _read(self, number: int, wanted: Box, out: np.ndarray) -> None:
        """Fill an array with the values in a box of a leaf."""
        places = self.leaves[number].shard_of.items()
        needed = {shard for box, shard in places if _overlap(box, wanted) is not None}
        for shard in sorted(needed):
            for part in self._parts_in(shard)[number]:
                overlap = _overlap(part.box, wanted)
                if overlap is not None:
                    _copy(part, overlap, wanted, out)


def _overlap(one: Box, other: Box) -> Box | None:
    """What lies in both boxes; None where nothing does."""
    axes = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True)]
    return tuple(axes) if all(start < stop for start, stop in axes) else None


def _copy(part: StoredPart, overlap: Box, wanted: Box, out: np.ndarray) -> None:
    """Copy what lies in the overlap from a part of a leaf to an array of the wanted box."""
    if not overlap:  # an array without axes
        out[...] = next(part.rows(0, 1))[1].reshape(())
        return

    (begin, end), *rest = overlap
    first_row, first_out = part.box[0][0], wanted[0][0]
    inside = [(a - c, b - c) for (a, b), (c, _) in zip(rest, part.box[1:], strict=True)]
    outside = [(a - c, b - c) for (a, b), (c, _) in zip(rest, wanted[1:], strict=True)]
    for row, values in part.rows(begin - first_row, end - first_row):
        to = first_row + row - first_out
        count = len(values)
        out[box_slices(((to, to + count), *outside))] = values[box_slices(((0, count), *inside))]
        del values  # before the next rows are read
