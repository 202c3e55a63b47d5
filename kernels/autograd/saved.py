"""What autograd saves for the backward pass, where more than one wants a say in it.

Of several ``torch.autograd.graph.saved_tensors_hooks`` torch runs the innermost ones alone, so
those of a layer would switch off the ones around it, such as those of activation checkpointing and
of ``save_on_cpu``. Here a layer takes the tensors that it knows, and the hooks around it get the
rest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# (tensor → what is kept of it, that → the tensor again)
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def hooks_around() -> Hooks:
    """The innermost hooks on saved tensors here; without any, those that keep the tensor itself."""
    found: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found or (_as_it_is, _unchanged)


@contextmanager
def saving(take: Callable[[Tensor], Any], give: Callable[[Any], Tensor]) -> Iterator[None]:
    """Inside the block, autograd keeps ``take(tensor)`` of a tensor that it saves and gets the
    tensor back from ``give``; where ``take`` says None, the hooks around the block keep it.

    The graph edge of a saved tensor stays, so derivatives beyond the first are right as well.
    """
    pack_around, unpack_around = hooks_around()

    def pack(tensor: Tensor) -> tuple[Callable[[Any], Tensor], Any]:
        kept = take(tensor)
        return (unpack_around, pack_around(tensor)) if kept is None else (give, kept)

    def unpack(packed: tuple[Callable[[Any], Tensor], Any]) -> Tensor:
        again, kept = packed
        return again(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _as_it_is(tensor: Tensor) -> tuple[Tensor, int]:
    # detached: a tensor that holds the node that holds it would never be freed
    return tensor.detach(), version_of(tensor)


def _unchanged(packed: tuple[Tensor, int]) -> Tensor:
    """The tensor. Torch does not look at versions where there are hooks."""
    tensor, version = packed
    if version_of(tensor) != version:
        raise RuntimeError(
            f"a tensor {tuple(tensor.shape)} that the backward pass reads was modified in place "
            "after the forward pass"
        )
    return tensor


def version_of(tensor: Tensor) -> int:
    """It changes when the tensor is modified in place."""
    return 0 if tensor.is_inference() else tensor._version
