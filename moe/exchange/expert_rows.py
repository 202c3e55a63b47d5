"""Tokens to rows and back, where rows are a tensor of their own.

Shape suffixes: T tokens, K choices of a token, R rows, D their width, P ranks, L experts of a rank.
"""

from typing import Any

import torch
from torch import Tensor

from ironmoe.kernels import Dispatch, Routing, combine
from ironmoe.kernels.route import without_autocast


def gathered(x_TD: Tensor, plan: Dispatch) -> Tensor:
    """(R, D), the rows of a plan. The gradient of a token is the sum over its rows in the order of
    its choices, so it is deterministic on a GPU, too."""
    return _Gather.apply(x_TD, plan)


def kept_rows(plan: Dispatch, kept: int) -> Dispatch:
    """The plan without the rows of dropped choices. kept: how many rows remain."""
    return plan._replace(row_token=plan.row_token[:kept], row_slot=plan.row_slot[:kept])


def combined(rows_RD: Tensor, routing: Routing, plan: Dispatch) -> Tensor:
    """``combine``, also where every choice of these tokens is dropped and there is no row."""
    if not len(rows_RD) and len(plan.slot_row):
        rows_RD = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])])
        nothing_1 = plan.offsets.new_zeros(1)
        plan = plan._replace(row_token=nothing_1, row_slot=nothing_1)
    with without_autocast(rows_RD):
        y_TD = combine(rows_RD, routing, plan)
    return torch.ops.aten._unsafe_view(y_TD, y_TD.shape)  # FSDP2 warns of views


def routing_of_rows(experts_R: Tensor, like: Tensor, num_experts: int) -> Routing:
    """Each row to one expert, with gate 1; 0 for rows of no expert (``num_experts``)."""
    wide = torch.promote_types(like.dtype, torch.float32)
    gates_R1 = (experts_R < num_experts).to(wide)[:, None]
    return Routing(gates_R1, experts_R.to(torch.int32)[:, None])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        if not len(x):  # a rank without tokens, whose buffers have places all the same
            return x.new_zeros(plan.row_token.numel(), x.shape[1])
        return x[plan.row_token.long()]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        plan = ctx.plan
        wide = torch.promote_types(grad.dtype, torch.float32)
        ones_TK = torch.ones(plan.slot_row.shape, dtype=wide, device=grad.device)
        return combined(grad, Routing(ones_TK, plan.slot_row), plan), None
