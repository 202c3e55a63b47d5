"""Keep nothing of H for the backward pass: compute it again there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ironmoe.kernels.autograd.saved import hooks_around, saving


@contextmanager
def recomputed(
    hidden: Sequence[Tensor],
    again: Callable[..., Sequence[Tensor]],
    sources: Sequence[Tensor | None],
    wanted: bool,
) -> Iterator[None]:
    """An operation inside the block that saves one of the tensors ``hidden`` saves its number
    instead. In backward the tensor is computed again by ``again(*sources)``. Hooks around the block
    decide how the sources are kept.

    RuntimeError in backward: one of ``sources`` was modified in place in the meantime.
    """
    if not wanted or torch.compiler.is_compiling():
        yield
        return
    number = {_place(tensor): i for i, tensor in enumerate(hidden) if tensor.numel()}
    computed: dict[int, Tensor] = {}
    pack, unpack = hooks_around()
    kept: list[Any] = [None if source is None else pack(source) for source in sources]

    def take(tensor: Tensor) -> int | None:
        return number.get(_place(tensor))

    def give(i: int) -> Tensor:
        if i not in computed:
            found = [None if packed is None else unpack(packed) for packed in kept]
            with torch.no_grad():
                computed.update(enumerate(again(*found)))
        return computed.pop(i)

    with saving(take, give):
        yield


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """What identifies a tensor: autograd hands out a new object for the same memory."""
    return tensor.data_ptr(), tensor.shape
