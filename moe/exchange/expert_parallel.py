"""Expert parallelism of one layer: its experts are shared out over the ranks of a group."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ironmoe.kernels import Dispatch, Routing, plan_dispatch
from ironmoe.kernels.route import autocast_dtype, forward_mode, transformed
from ironmoe.moe.exchange.agreement import Place, header_of
from ironmoe.moe.exchange.bounded import Overflow, bounded
from ironmoe.moe.exchange.dropless import Experts, dropless
from ironmoe.moe.exchange.expert_rows import combined
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.exchange.local_part import local_part
from ironmoe.moe.exchange.replicated import Layer, replicated


def nothing() -> None:
    """There is nothing to compute while rows travel."""


class ExpertParallel:
    """What a layer asks where its experts are shared out: rank r of P has the experts
    r · E / P … (r + 1) · E / P − 1.

    Args:
        group: the ranks.
        num_experts: E of the whole layer.
        place: the number of the layer and of its model, the same on every rank.
        gradients: of the experts. They are those of the tokens of all ranks: their "sum", or
            divided by P, the "mean" over ranks, as data parallelism makes it of all other weights.
        max_tokens_per_rank: how many rows a rank sends at most to each rank; None: as many as there
            are.

    Attributes:
        tokens_are_replicated: whether all ranks have the same tokens; else each has its own.
        every_row_travels: whether ``max_tokens_per_rank`` does not count for now.
        repeated: (number of a backward pass, whether the layers that it repeats have the same
            tokens on all ranks); there every row travels. None: no such pass is known.
        copies: the ranks that have the same experts as this one, where nobody averages their
            gradients; else None.
        overflow: how many choices of this rank found no place in the buffers of
            ``max_tokens_per_rank``.
    """

    def __init__(
        self,
        group: Group,
        num_experts: int,
        *,
        place: Place | None = None,
        gradients: str = "mean",
        max_tokens_per_rank: int | None = None,
    ) -> None:
        self.group = group
        self.num_experts = num_experts
        self.place = place or Place()
        self.gradients = gradients
        self.max_tokens_per_rank = max_tokens_per_rank
        self.tokens_are_replicated = False
        self.every_row_travels = False
        self.repeated: tuple[int, bool] | None = None
        self.copies: Group | None = None
        self.overflow = Overflow()

    @property
    def num_local_experts(self) -> int:
        """How many experts this rank has."""
        return self.num_experts // self.group.size

    def local(self, weight: Tensor | None) -> Any:
        """This rank's part of a weight or bias of the experts. A plain tensor is taken as the part
        itself.

        Raises:
            NotImplementedError: inside a transform of torch.func or forward-mode differentiation.
        """
        if transformed() or forward_mode():
            raise NotImplementedError(
                "expert parallelism has no rule for torch.func and forward mode: use "
                "torch.autograd.grad, or a model whose experts are on one device"
            )
        if weight is None or not hasattr(weight, "to_local"):
            return weight
        is_replicated, _ = self._kind_of_pass()
        is_mean = self.gradients == "mean" and not is_replicated
        return local_part(weight, self.group.size if is_mean else 1)

    def __call__(
        self,
        x_TD: Tensor,
        routing: Routing,
        dispatch: Dispatch | None,
        *,
        experts: Experts,
        layer: Layer,
        weights_need_grad: bool,
        travel_dtype: torch.dtype | None = None,
        meanwhile: Callable[[], None] = nothing,
    ) -> Tensor:
        """y (T, D) of tokens x (T, D). Each rank of the group must call it, also one without
        tokens.

        Args:
            routing, dispatch: over all E experts; the dispatch where it is at hand already.
            experts: rows (R, D), routing (R, 1) → (R, D), by the experts of this rank, which are
                numbered from 0.
            layer: the same for tokens (T, D) and their gates.
            weights_need_grad: whether a weight of the experts requires grad.
            travel_dtype: rows are rounded to this dtype when they leave a rank.
            meanwhile: runs once, while rows travel.

        Raises:
            RanksDisagreeError: ranks came with other dtypes, other requires_grad, or in another
                layer.
            ExchangeError: a rank did not come.
        """
        dtype = autocast_dtype(x_TD)
        x_TD = x_TD if dtype is None else x_TD.to(dtype)
        is_replicated, every_row = self._kind_of_pass()
        if is_replicated:
            meanwhile()
            return replicated(self.group, x_TD, routing, self.num_experts, layer)

        plan = dispatch or plan_dispatch(routing.experts, self.num_experts)
        computed_in = x_TD.dtype
        sent_TD = x_TD if travel_dtype is None else x_TD.to(travel_dtype)

        def rounded(rows_RD: Tensor, own: Routing) -> Tensor:
            out_RD = experts(rows_RD.to(computed_in), own)
            return out_RD if travel_dtype is None else out_RD.to(travel_dtype)

        most = None if every_row else self.max_tokens_per_rank
        header = header_of(
            sent_TD,
            place=self.place,
            bounded=most,
            weights_need_grad=weights_need_grad,
        )
        if most is None:
            out_RD, plan = dropless(self.group, header, sent_TD, plan, rounded, meanwhile)
        else:
            out_RD, plan, dropped = bounded(
                self.group, header, sent_TD, routing.experts, plan, rounded, meanwhile
            )
            self.overflow.add(dropped, layer=self.place.layer, places=most)
        return combined(out_RD.to(computed_in), routing, plan)

    def _kind_of_pass(self) -> tuple[bool, bool]:
        """Whether all ranks have the same tokens, and whether every row travels. Activation
        checkpointing repeats a pass inside a backward pass, which knows of what kind it was."""
        if self.repeated is not None:
            number, is_replicated = self.repeated
            if number == torch._C._current_graph_task_id():
                return is_replicated, True
        return self.tokens_are_replicated, self.every_row_travels

    def __deepcopy__(self, _: Any) -> "ExpertParallel":
        """A copy of a layer exchanges with the same ranks. It has dropped nothing yet, and it is in
        no block that its model is in."""
        same = ExpertParallel(
            self.group,
            self.num_experts,
            place=self.place,
            gradients=self.gradients,
            max_tokens_per_rank=self.max_tokens_per_rank,
        )
        same.copies = self.copies
        return same


@contextmanager
def replicated_tokens(states: list[ExpertParallel]) -> Iterator[None]:
    """Inside the block all ranks have the same tokens."""
    before = [state.tokens_are_replicated for state in states]
    try:
        for state in states:
            state.tokens_are_replicated = True
        yield
    finally:
        for state, value in zip(states, before, strict=True):
            state.tokens_are_replicated = value
