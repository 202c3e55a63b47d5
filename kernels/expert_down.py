"""The second half of the expert: activation, second layer, and the sum over a token's choices
weighted by its gates.

    y_t = Σ_k gates[t, k] · (W₂ₑ act(h) + b₂ₑ)

The gate gradient is ⟨dA′, A⟩ + ⟨dO, b₂⟩, taken before gating (SonicMoE, arXiv 2512.14080): exact
where a gate is 0.

Shape suffixes: R rows, D columns of y; r rows of a tile, F units.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ironmoe.kernels.activations import ACTIVATIONS, Activation
from ironmoe.kernels.autograd.demand import demanded
from ironmoe.kernels.combine import gather_sum
from ironmoe.kernels.grouped_matmul import or_empty
from ironmoe.kernels.route import takes_triton
from ironmoe.kernels.tiles import (
    ExpertSum,
    Tile,
    at_least_float32,
    matmul,
    per_expert,
    split_rows,
    stack_rows,
    tiles,
)
from ironmoe.kernels.types import Dispatch


def down_tiles(
    gates: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    activated: Iterable[Tensor],
    slot_row: Tensor,
    plan: list[Tile],
) -> Tensor:
    """The torch twin: activated units, one tensor (r, F) a tile, to y (T, D)."""
    weights, biases = per_expert(w_out.transpose(1, 2)), per_expert(b_out, len(w_out))
    rows = [
        matmul(a_rF, weights[tile.expert], biases[tile.expert])
        for a_rF, tile in zip(activated, plan, strict=True)
    ]
    return gather_sum(stack_rows(rows, slot_row.numel()), gates, slot_row)


def down_tiles_backward(
    dy: Tensor,
    gates: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    hidden: Sequence[Tensor],
    dispatch: Dispatch,
    *,
    act: Activation,
    plan: list[Tile],
    want: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
    """(d_gates, dW₂, db₂, dH tile by tile) from the pre-activations; None or no tiles where
    ``want`` says no. Differentiable in turn."""
    want_gates, want_w, want_b, want_h = want
    _, row_token, row_slot, slot_row = dispatch
    weights, biases = per_expert(w_out), per_expert(b_out, len(w_out))
    exact = torch.promote_types(at_least_float32(w_out), gates.dtype)
    rows = slice(plan[-1].stop)
    gates_R1 = gates[row_token[rows].long(), row_slot[rows].long()].unsqueeze(-1).to(exact)
    dy_RD = dy.index_select(0, row_token[rows])
    dy_tiles, gates_tiles = split_rows(dy_RD, plan), split_rows(gates_R1, plan)
    if want_w or want_b or (want_h and not want_gates):
        gated_tiles = split_rows((dy_RD * gates_R1).to(dy.dtype), plan)

    d_gates_tiles, dh_tiles = [], []
    dw = ExpertSum(w_out.shape, w_out, want_w)
    db = ExpertSum(w_out.shape[:2], w_out, want_b)
    for i, (expert, *_) in enumerate(plan):
        if want_gates or want_w:
            a_rF = act.value(hidden[i])
        # The gate's gradient needs dA before gating. Without it the gate is multiplied into dy,
        # whose rows are narrower than those of dA.
        if want_gates:
            da_rF = matmul(dy_tiles[i], weights[expert], feeds_product=True)
            d_gates_r = (da_rF.to(exact) * a_rF).sum(-1)
            if b_out is not None:
                d_gates_r = d_gates_r + dy_tiles[i].to(exact) @ biases[expert].to(exact)
            d_gates_tiles.append(d_gates_r.unsqueeze(-1))
            da_rF = (da_rF * gates_tiles[i]).to(da_rF.dtype) if want_h else da_rF
        elif want_h:
            da_rF = matmul(gated_tiles[i], weights[expert], feeds_product=True)
        if want_h:
            dh_tiles.append(act.backward(da_rF, hidden[i]))
        if want_w:
            dw.add(expert, matmul(gated_tiles[i].t(), a_rF))
        if want_b:
            db.add(expert, gated_tiles[i].sum(0))

    d_gates = None
    if want_gates:
        d_gates_R = stack_rows(d_gates_tiles, slot_row.numel()).squeeze(-1)
        d_gates = d_gates_R[slot_row.clamp_min(0)].masked_fill(slot_row < 0, 0).to(gates.dtype)
    return d_gates, dw.total(), db.total(), dh_tiles


@custom_op("ironmoe::expert_down", mutates_args=())
def expert_down_op(
    gates: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    hidden: Tensor,
    activated: Tensor,
    offsets: Tensor,
    tiles_2n: Tensor | None,
    row_token: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    activation: str,
    precision: str,
) -> Tensor:
    """y (T, D) from the activated units (R, F). Gradients flow through ``hidden``, which may be
    empty where none are wanted."""
    if takes_triton(activated):
        from ironmoe.kernels.gpu import combine, grouped_matmul

        rows, _ = grouped_matmul.grouped_matmul(
            activated, w_out, b_out, offsets, tiles_2n, precision=precision
        )
        assert rows is not None
        return combine.combine(rows, gates, slot_row)
    plan = list(tiles(offsets, w_out.shape[2] * w_out.element_size()))
    return down_tiles(
        gates, w_out, b_out, split_rows(activated[: plan[-1].stop], plan), slot_row, plan
    )


@expert_down_op.register_fake
def _(  # type: ignore[no-untyped-def]
    gates,
    w_out,
    b_out,
    hidden,
    activated,
    offsets,
    tiles_2n,
    row_token,
    row_slot,
    slot_row,
    activation,
    precision,
):
    return activated.new_empty(slot_row.shape[0], w_out.shape[1])


@custom_op("ironmoe::expert_down_backward", mutates_args=())
def expert_down_backward_op(
    dy: Tensor,
    gates: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    hidden: Tensor,
    offsets: Tensor,
    tiles_2n: Tensor | None,
    row_token: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    activation: str,
    precision: str,
    want_gates: bool,
    want_w: bool,
    want_b: bool,
    want_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_gates, dW₂, db₂, dH), each empty where not wanted."""
    d_gates = dw = db = dh = gated = None
    if takes_triton(dy):
        from ironmoe.kernels.gpu import hidden_gradient, weight_gradient

        if want_gates or want_h or want_w:
            d_gates, dh, gated = hidden_gradient.hidden_gradient(
                dy,
                gates,
                w_out,
                b_out,
                hidden,
                Dispatch(offsets, row_token, row_slot, slot_row),
                tiles=tiles_2n,
                activation=activation,
                precision=precision,
                want_gates=want_gates,
                want_hidden=want_h,
                want_gated=want_w,
            )
            d_gates = None if d_gates is None else d_gates.to(gates.dtype)
        if gated is not None:
            dw = weight_gradient.weight_gradient(dy, row_token, gated, None, offsets, precision)
        if want_b:
            db = weight_gradient.expert_sum(dy, offsets, gates, row_token, row_slot)
    else:
        plan = list(tiles(offsets, w_out.shape[2] * w_out.element_size()))
        d_gates, dw, db, dh_tiles = down_tiles_backward(
            dy,
            gates,
            w_out,
            b_out,
            split_rows(hidden[: plan[-1].stop], plan),
            Dispatch(offsets, row_token, row_slot, slot_row),
            act=ACTIVATIONS[activation],
            plan=plan,
            want=(want_gates, want_w, want_b, want_h),
        )
        dh = stack_rows(dh_tiles, len(hidden)) if want_h else None
    return or_empty(d_gates, gates), or_empty(dw, dy), or_empty(db, dy), or_empty(dh, dy)


@expert_down_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    dy,
    gates,
    w_out,
    b_out,
    hidden,
    offsets,
    tiles_2n,
    row_token,
    row_slot,
    slot_row,
    activation,
    precision,
    want_gates,
    want_w,
    want_b,
    want_h,
):
    return (
        gates.new_empty(gates.shape) if want_gates else gates.new_empty(0),
        dy.new_empty(w_out.shape) if want_w else dy.new_empty(0),
        dy.new_empty(w_out.shape[:2]) if want_b else dy.new_empty(0),
        dy.new_empty(hidden.shape) if want_h else dy.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gates, w_out, b_out, hidden, _, *plan, ctx.activation, ctx.precision = inputs
    only_b_out = not any(ctx.needs_input_grad[i] for i in (0, 1, 3))
    ctx.has_bias = b_out is not None
    ctx.save_for_backward(gates, w_out, b_out, None if only_b_out else hidden, *plan)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gates, w_out, b_out, hidden, offsets, tiles_2n, *index = ctx.saved_tensors
    want = demanded(ctx, (True, True, ctx.has_bias, True))
    if torch.is_grad_enabled():  # create_graph: what is recorded here must have derivatives itself
        act = ACTIVATIONS[ctx.activation]
        plan = list(tiles(offsets, w_out.shape[2] * w_out.element_size()))
        hidden_tiles = () if hidden is None else split_rows(hidden[: plan[-1].stop], plan)
        dispatch = Dispatch(offsets, *index)
        *grads, dh_tiles = down_tiles_backward(
            dy, gates, w_out, b_out, hidden_tiles, dispatch, act=act, plan=plan, want=want
        )
        dh = stack_rows(dh_tiles, len(dispatch.row_token)) if want[3] else None
        return (*grads, dh, *(None,) * 8)
    hidden = dy.new_empty(0) if hidden is None else hidden
    row_token, row_slot, slot_row = index
    want_gates, want_w, want_b, want_h = want
    results = expert_down_backward_op(
        dy,
        gates,
        w_out,
        b_out,
        hidden,
        offsets,
        tiles_2n=tiles_2n,
        row_token=row_token,
        row_slot=row_slot,
        slot_row=slot_row,
        activation=ctx.activation,
        precision=ctx.precision,
        want_gates=want_gates,
        want_w=want_w,
        want_b=want_b,
        want_h=want_h,
    )
    return (
        *(result if wanted else None for result, wanted in zip(results, want, strict=True)),
        *(None,) * 8,
    )


expert_down_op.register_autograd(_backward, setup_context=_setup)
