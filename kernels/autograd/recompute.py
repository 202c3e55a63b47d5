"""Keep nothing of H for the backward pass: compute it again there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def recomputed(
    hidden: Sequence[Tensor],
    again: Callable[[], Sequence[Tensor]],
    sources: Sequence[Tensor | None],
    wanted: bool,
) -> Iterator[None]:
    """An operation inside the block that saves one of the tensors ``hidden`` saves its number
    instead. In backward the tensor is computed again by ``again``, which reads ``sources``.

    The graph edge of a saved tensor stays, so derivatives beyond the first are right as well.

    RuntimeError in backward: one of ``sources`` was modified in place in the meantime.
    """
    if not wanted or torch.compiler.is_compiling():
        yield
        return
    number = {_place(tensor): i for i, tensor in enumerate(hidden) if tensor.numel()}
    computed: dict[int, Tensor] = {}
    versions = [_version(source) for source in sources]

    def pack(tensor: Tensor) -> int | Tensor:
        return number.get(_place(tensor), tensor)

    def unpack(packed: int | Tensor) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed not in computed:
            if [_version(source) for source in sources] != versions:
                raise RuntimeError(
                    "with recompute=True x, w_in and b_in are read again in backward; one was "
                    "modified in place"
                )
            with torch.no_grad():
                computed.update(enumerate(again()))
        return computed.pop(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """What identifies a tensor: autograd hands out a new object for the same memory."""
    return tensor.data_ptr(), tensor.shape
