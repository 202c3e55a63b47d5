"""Combine: each token gathers its K rows and sums them with its gates, in the order of its
choices.

Shape suffixes: T tokens, K choices of a token, R rows, D columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ironmoe.kernels.autograd.demand import demanded, with_own_node
from ironmoe.kernels.route import forward_mode, may_look, takes_operators, takes_triton, transformed
from ironmoe.kernels.types import Dispatch, Routing


def combine(rows: Tensor, routing: Routing, dispatch: Dispatch) -> Tensor:
    """y_t = Σ_k gates[t, k] · rows[slot_row[t, k]], accumulated in at least float32; dropped
    choices add nothing.

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
        raise ValueError(
            f"rows must be (R, D) with R = {dispatch.row_token.numel()}, got shape "
            f"{tuple(rows.shape)}"
        )
    if routing.gates.shape != dispatch.slot_row.shape:
        raise ValueError(
            f"routing.gates must have the plan's shape {tuple(dispatch.slot_row.shape)}, got "
            f"{tuple(routing.gates.shape)}"
        )
    if takes_operators(rows) and not transformed() and not forward_mode():
        own_rows, own_gates = with_own_node(rows), with_own_node(routing.gates)
        return combine_op(own_rows, own_gates, *dispatch[1:])
    return gather_sum(rows, routing.gates, dispatch.slot_row)


def gather_sum(rows_RD: Tensor, gates_TK: Tensor, slot_row_TK: Tensor) -> Tensor:
    """The torch twin. Outside autograd on CPU one fused pass (embedding_bag) does it."""
    records = torch.is_grad_enabled() and (rows_RD.requires_grad or gates_TK.requires_grad)
    wants_grad = records or forward_mode()
    dropless = may_look(rows_RD) and slot_row_TK.numel() > 0 and int(slot_row_TK.min()) >= 0
    both = torch.promote_types(rows_RD.dtype, gates_TK.dtype)
    accumulate = torch.promote_types(both, torch.float32)

    if dropless and not wants_grad:
        sums_TD = torch.nn.functional.embedding_bag(
            slot_row_TK,
            rows_RD.to(accumulate),
            mode="sum",
            per_sample_weights=gates_TK.to(accumulate),
        )
        return sums_TD.to(rows_RD.dtype)

    gathered_TKD = rows_RD[slot_row_TK.clamp_min(0).long()]  # ONNX has no other index
    if not dropless:
        # Both factors become 0: a NaN in either would make the product NaN.
        kept_TK = slot_row_TK >= 0
        gathered_TKD = gathered_TKD.masked_fill(~kept_TK.unsqueeze(-1), 0)
        gates_TK = gates_TK.masked_fill(~kept_TK, 0)
    sums_TD = torch.einsum("tk,tkd->td", gates_TK.to(accumulate), gathered_TKD.to(accumulate))
    return sums_TD.to(rows_RD.dtype)


@custom_op("ironmoe::combine", mutates_args=())
def combine_op(
    rows: Tensor, gates: Tensor, row_token: Tensor, row_slot: Tensor, slot_row: Tensor
) -> Tensor:
    """y (T, D) from rows (R, D) and gates (T, K)."""
    if takes_triton(rows):
        from ironmoe.kernels.gpu import combine as gpu

        return gpu.combine(rows, gates, slot_row)
    return gather_sum(rows, gates, slot_row)


@combine_op.register_fake
def _(rows, gates, row_token, row_slot, slot_row):  # type: ignore[no-untyped-def]
    return rows.new_empty(slot_row.shape[0], rows.shape[1])


@custom_op("ironmoe::combine_backward", mutates_args=())
def combine_backward_op(
    dy: Tensor,
    rows: Tensor,
    gates: Tensor,
    row_token: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    want_rows: bool,
    want_gates: bool,
) -> tuple[Tensor, Tensor]:
    """(d_rows, d_gates), each empty where not wanted."""
    if takes_triton(dy):
        from ironmoe.kernels.gpu import combine as gpu

        d_rows, d_gates = gpu.combine_backward(
            dy,
            rows,
            gates,
            row_token,
            row_slot,
            slot_row,
            want_rows=want_rows,
            want_gates=want_gates,
        )
    else:
        index = (row_token, row_slot, slot_row)
        d_rows, d_gates = _backward_by_torch(dy, rows, gates, index, want=(want_rows, want_gates))
    return (
        rows.new_empty(0) if d_rows is None else d_rows,
        gates.new_empty(0) if d_gates is None else d_gates.to(gates.dtype),
    )


@combine_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    dy,
    rows,
    gates,
    row_token,
    row_slot,
    slot_row,
    want_rows,
    want_gates,
):
    d_rows = rows.new_empty(rows.shape) if want_rows else rows.new_empty(0)
    return d_rows, gates.new_empty(gates.shape) if want_gates else gates.new_empty(0)


def _backward_by_torch(
    dy: Tensor,
    rows: Tensor,
    gates: Tensor,
    index: Sequence[Tensor],
    want: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The torch twin: (d_rows, d_gates), None where ``want`` says no. Differentiable in turn.

    index: row_token, row_slot and slot_row of a ``Dispatch``.
    """
    row_token, row_slot, slot_row = index
    want_rows, want_gates = want
    wide = torch.promote_types(torch.promote_types(rows.dtype, gates.dtype), torch.float32)
    d_rows = d_gates = None

    if want_rows:
        token, slot = row_token.long(), row_slot.long()
        gates_R = gates.masked_fill(slot_row < 0, 0)[token, slot]
        d_rows = (dy[token].to(wide) * gates_R.unsqueeze(-1).to(wide)).to(rows.dtype)
    if want_gates:
        gathered_TKD = rows[slot_row.clamp_min(0)].to(wide)
        d_gates = torch.einsum("td,tkd->tk", dy.to(wide), gathered_TKD)
        d_gates = d_gates.masked_fill(slot_row < 0, 0).to(gates.dtype)
    return d_rows, d_gates


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    rows, gates, *index = inputs
    ctx.save_for_backward(rows, gates, *index)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    rows, gates, *index = ctx.saved_tensors
    want = demanded(ctx, (True, True))
    if torch.is_grad_enabled():  # create_graph: what is recorded here must have derivatives itself
        return (*_backward_by_torch(dy, rows, gates, index, want), None, None, None)
    results = combine_backward_op(dy, rows, gates, *index, *want)
    return (
        *(result if wanted else None for result, wanted in zip(results, want, strict=True)),
        None,
        None,
        None,
    )


combine_op.register_autograd(_backward, setup_context=_setup)
