"""The experts of a layer that stay on the device between passes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.kernels.autograd.saved import version_of
from ironmoe.moe.offload.stacks import NOTHING, ExpertOffload, Stack, Weights


class Host(NamedTuple):
    """Weights in host memory, as they were at a moment, and the dtype to compute in.

    versions: of the tensors, or 0 of one that is not there
    """

    weights: Weights
    versions: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def now(cls, weights: Weights, dtype: torch.dtype) -> "Host":
        return cls(weights, tuple(0 if w is None else version_of(w) for w in weights), dtype)

    def same_as(self, other: "Host | None") -> bool:
        """Whether both are the same tensors, unmodified, for the same dtype."""
        return (
            other is not None
            and all(a is b for a, b in zip(self.weights, other.weights, strict=True))
            and self[1:] == other[1:]
        )


class ResidentExperts:
    """Up to ``keep`` experts of a layer, those that were used last. A stack is never written to
    again, since a graph of higher order may hold it: other experts mean another stack."""

    def __init__(self, keep: int, offload: ExpertOffload) -> None:
        self.keep = keep
        self.offload = offload
        self.stack = NOTHING
        self._host: Host | None = None  # what the stack is a copy of
        self._latest: list[int] = []  # numbers of experts, the last used first

    def having(self, experts: Sequence[int], host: Host) -> Stack:
        """A stack with these experts, at least one; perhaps others, too."""
        if not host.same_as(self._host):
            self.stack, self._host = NOTHING, host
        if not experts:  # a product of no rows takes a matrix, too
            experts = self.stack.experts[:1] or (0,)
        used, there = set(experts), set(self.stack.experts)
        self._latest = [*experts, *(e for e in self._latest if e not in used)]

        if used <= there:
            return self.stack
        stay = [e for e in self._latest if e in there - used][: max(self.keep - len(used), 0)]
        return self._copies(sorted([*experts, *stay]), host, self.stack)

    def retain(self, stack: Stack, host: Host) -> None:
        """Of the experts of a pass keep as many as may stay. Those that were there before come
        first, so that equal passes copy nothing."""
        if len(stack.experts) <= self.keep:
            self.stack = stack
            return
        before = set(self.stack.experts)
        stay = sorted(sorted(stack.experts, key=lambda e: e not in before)[: self.keep])
        if set(stay) != before:
            self.stack = self._copies(stay, host, stack)

    def again(self, which: int, experts: Sequence[int], host: Host) -> Tensor:
        """(len(experts), …) one of the weights of these ascending experts; a view, where they stand
        side by side in the stack that is there."""
        near = self.stack if host.same_as(self._host) else NOTHING
        stacked = near.weights[which]
        if stacked is not None and experts[0] in near.experts:
            place = near.experts.index(experts[0])
            if near.experts[place : place + len(experts)] == tuple(experts):
                return stacked[place : place + len(experts)]
        copied = self._copy(which, experts, host, near)
        assert copied is not None
        return copied

    def _copies(self, experts: Sequence[int], host: Host, near: Stack) -> Stack:
        if not experts:
            return NOTHING
        copies = [self._copy(which, experts, host, near) for which in range(len(host.weights))]
        return Stack(tuple(experts), tuple(copies))

    def _copy(self, which: int, experts: Sequence[int], host: Host, near: Stack) -> Tensor | None:
        weight = host.weights[which]
        if weight is None:
            return None
        return self.offload.bring(weight, experts, host.dtype, (near.experts, near.weights[which]))
