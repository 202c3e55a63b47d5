"""Combine: each token gathers its K rows and sums them with its gates, in the order of its choices."""

import torch
from torch import Tensor

from ironmoe.kernels.dispatch import Dispatch
from ironmoe.kernels.topk import Routing


def combine(rows: Tensor, routing: Routing, dispatch: Dispatch) -> Tensor:
    """y_t = Σ_k gates[t, k] · rows[slot_row[t, k]], accumulated in at least float32; dropped choices add nothing.

    Args:
        rows: (R, D), any float dtype, sorted by expert as ``dispatch`` says.
        routing: gates (T, K).
        dispatch: the plan the rows were sorted by.

    Returns:
        (T, D) in the dtype of ``rows``. Differentiable to any order with respect to rows and gates.

    Raises:
        ValueError: rows, gates and plan do not belong together.
    """
    if rows.ndim != 2 or rows.shape[0] != dispatch.row_token.numel():
        raise ValueError(f"rows must be (R, D) with R = {dispatch.row_token.numel()}, got shape {tuple(rows.shape)}")
    if routing.gates.shape != dispatch.slot_row.shape:
        raise ValueError(
            f"routing.gates must have the plan's shape {tuple(dispatch.slot_row.shape)}, got {tuple(routing.gates.shape)}"
        )
    return gather_sum(rows, routing.gates, dispatch.slot_row)


def gather_sum(rows_RD: Tensor, gates_TK: Tensor, slot_row_TK: Tensor) -> Tensor:
    """The sum itself. Outside autograd on CPU one fused pass (embedding_bag) does it."""
    wants_grad = torch.is_grad_enabled() and (rows_RD.requires_grad or gates_TK.requires_grad)
    can_look = rows_RD.device.type == "cpu" and not torch.compiler.is_compiling() and slot_row_TK.numel() > 0
    dropless = can_look and int(slot_row_TK.min()) >= 0
    accumulate = torch.promote_types(torch.promote_types(rows_RD.dtype, gates_TK.dtype), torch.float32)
    if dropless and not wants_grad:
        sums_TD = torch.nn.functional.embedding_bag(
            slot_row_TK, rows_RD.to(accumulate), mode="sum", per_sample_weights=gates_TK.to(accumulate)
        )
        return sums_TD.to(rows_RD.dtype)
    gathered_TKD = rows_RD[slot_row_TK.clamp_min(0)]
    if not dropless:
        kept_TK = slot_row_TK >= 0
        gathered_TKD = gathered_TKD.masked_fill(~kept_TK.unsqueeze(-1), 0)
        gates_TK = gates_TK.masked_fill(~kept_TK, 0)
    sums_TD = torch.einsum("tk,tkd->td", gates_TK.to(accumulate), gathered_TKD.to(accumulate))
    return sums_TD.to(rows_RD.dtype)
