"""Every kernel is launched from here, so that launches can be counted, and recorded without a
GPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Launch(NamedTuple):
    """One launch: what was run, over how many programs, with which arguments, and how it is
    compiled."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def tile(self) -> tuple[int, int, int] | None:
        """(rows, columns, terms of a step) of a product; None of another kernel."""
        return tile_of(self.arguments)


def tile_of(arguments: dict[str, Any]) -> tuple[int, int, int] | None:
    """``Launch.tile`` of the arguments of a kernel, by name."""
    blocks = arguments.get("BLOCKS")
    return None if blocks is None else (blocks.m, blocks.n, blocks.k)


_observers: list[list[Launch]] = []


@contextmanager
def observe() -> Iterator[list[Launch]]:
    """A list that receives every launch made inside the block."""
    seen: list[Launch] = []
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers.remove(seen)


def launch(
    kernel: Any, programs: int, num_warps: int = 4, num_stages: int = 2, **arguments: Any
) -> None:
    """Run ``kernel`` over a one-dimensional grid; none for no programs. On meta tensors it is only
    recorded."""
    if programs == 0:
        return
    for seen in _observers:
        seen.append(Launch(kernel, (programs,), arguments, num_warps, num_stages))
    device = next(
        base.device for base in map(_base, arguments.values()) if isinstance(base, Tensor)
    )
    if device.type == "meta":
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments, num_warps=num_warps, num_stages=num_stages)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own may be called in kernels, and takes 2 µs on the host for
    it."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


def _base(argument: Any) -> Any:
    return argument.base if isinstance(argument, TensorDescriptor) else argument
