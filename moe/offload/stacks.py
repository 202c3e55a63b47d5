"""Experts that are copied to the device that computes, and how much of it that takes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ironmoe.kernels.route import transformed

# w_in (E, N, D), b_in (E, N) or None, w_out (E, D, F), b_out (E, D) or None
Weights = tuple[Any, ...]


class Stack(NamedTuple):
    """Some experts on the device.

    experts: their numbers, ascending; weights: each (len(experts), …)
    """

    experts: tuple[int, ...]
    weights: Weights


NOTHING = Stack((), (None,) * 4)


class ExpertOffload:
    """What an offload of experts costs so far: ``offload_experts`` gives it.

    device: where experts compute.
    copied_bytes: of weights that were copied from host memory.
    peak_bytes: the most that copies of weights took on the device at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copied_bytes = 0
        self.peak_bytes = 0
        self._copies: list[tuple[StorageWeakRef, int]] = []

    @property
    def held_bytes(self) -> int:
        """What copies of weights take on the device now, whoever holds them."""
        self._copies = [copy for copy in self._copies if not copy[0].expired()]
        return sum(size for _, size in self._copies)

    def bring(
        self,
        host: Tensor,
        experts: Sequence[int],
        dtype: torch.dtype,
        there: tuple[Sequence[int], Tensor | None] = ((), None),
    ) -> Tensor:
        """(len(experts), …) in this dtype on the device: a copy of these ascending experts, from
        what is ``there`` (numbers and their stack) where that has them, else from ``host``
        (E, …)."""
        numbers, near = there
        place_of = {expert: place for place, expert in enumerate(numbers)}
        from_near = [(i, place_of[e]) for i, e in enumerate(experts) if e in place_of]
        from_host = [(i, e) for i, e in enumerate(experts) if e not in place_of]

        # a pass in inference mode must not leave tensors that a later one cannot save
        with torch.inference_mode(False), torch.no_grad():
            stack = torch.empty((len(experts), *host.shape[1:]), dtype=dtype, device=self.device)
            if not transformed():  # whose tensors have no memory of their own
                self._count(stack)
            for to, start, count in _runs(from_near):
                assert near is not None
                stack[to : to + count].copy_(near[start : start + count])
            for to, start, count in _runs(from_host):
                piece = host[start : start + count]
                self.copied_bytes += piece.nbytes
                # otherwise the host would convert, into memory that is not pinned
                piece = piece.to(self.device, non_blocking=True) if dtype != host.dtype else piece
                stack[to : to + count].copy_(piece, non_blocking=True)
        return stack

    def _count(self, stack: Tensor) -> None:
        self._copies.append((StorageWeakRef(stack.untyped_storage()), stack.nbytes))
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)


def _runs(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(to, start, count) of each run in which both numbers go up by 1, since one copy of many
    experts is faster than many copies."""
    runs: list[tuple[int, int, int]] = []
    for to, start in pairs:
        if runs and (to, start) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((to, start, 1))
    return runs
