"""Grouped matmul: rows sorted by expert times that expert's matrix, with the rows gathered and the
activation applied on the way.

    H = x[row_token] W₁ᵀ + b₁        A = act(H)

The operator gives both. Only H is differentiable: the second layer reads A and differentiates
through H.

Shape suffixes: T tokens, K choices, R rows, D columns of x; r rows of a tile, F columns of H.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ironmoe.kernels.activations import ACTIVATIONS
from ironmoe.kernels.autograd.demand import demanded, with_own_node
from ironmoe.kernels.checks import check_experts
from ironmoe.kernels.combine import gather_sum
from ironmoe.kernels.dispatch import tiles_ahead
from ironmoe.kernels.onnx_graph import grouped_rows
from ironmoe.kernels.route import (
    check_precision,
    forward_mode,
    onnx_exporting,
    takes_operators,
    takes_triton,
    transformed,
)
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


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """y[r] = weight[e] @ x[r] + bias[e] for each row r of expert e; rows past offsets[E] are 0.

    Args:
        x: (R, D) rows sorted by expert.
        weight: (E, N, D), each expert's matrix as nn.Linear stores it; any strides.
        offsets: (E + 1,) int32, as ``plan_dispatch`` gives them.
        bias: (E, N) or None.
        precision: float32 products on a GPU: "ieee", or "tf32" for tensor cores with 10 bits of
            mantissa.

    Returns:
        (R, N) in the dtype of ``x``. Differentiable to any order; the gradient of ``weight`` is
        computed only where it is asked for.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    check_experts(x, weight, bias, "weight", "bias")
    check_precision(precision)
    if offsets.shape != (weight.shape[0] + 1,):
        raise ValueError(
            f"offsets must have shape ({weight.shape[0] + 1},), one more than experts, got "
            f"{tuple(offsets.shape)}"
        )
    if onnx_exporting():
        return grouped_rows(x, weight, bias, offsets)
    if takes_operators(x) and not transformed() and not forward_mode():
        own_x, own_weight, own_bias = map(with_own_node, (x, weight, bias))
        cut = tiles_ahead(offsets, x.shape[0], x.dtype)
        hidden, _ = grouped_matmul_op(
            own_x,
            own_weight,
            own_bias,
            offsets,
            cut,
            row_token=None,
            slot_row=None,
            activation="none",
            keep_hidden=True,
            precision=precision,
        )
        return hidden

    plan = list(tiles(offsets, max(weight.shape[1:]) * x.element_size()))
    return stack_rows(product_tiles(x, weight, bias, None, plan), len(x))


def product_tiles(
    x: Tensor, weight: Tensor, bias: Tensor | None, row_token: Tensor | None, plan: list[Tile]
) -> tuple[Tensor, ...]:
    """The torch twin: x[row_token] W ᵀ + b, one tensor (r, N) a tile. Differentiable by
    autograd."""
    weights, biases = per_expert(weight.transpose(1, 2)), per_expert(bias, len(weight))
    feeds = row_token is not None  # then this is a first layer
    return tuple(
        matmul(x_rD, weights[tile.expert], biases[tile.expert], feeds_product=feeds)
        for x_rD, tile in zip(gathered(x, row_token, plan), plan, strict=True)
    )


def product_tiles_backward(
    dh_tiles: Sequence[Tensor],
    x: Tensor | None,
    weight: Tensor,
    row_token: Tensor | None,
    slot_row: Tensor | None,
    *,
    num_rows: int,
    plan: list[Tile],
    want: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dW, db) of ``product_tiles``, None where ``want`` says no; differentiable in turn."""
    want_x, want_w, want_b = want
    dx = None
    if want_x:
        weights = per_expert(weight)
        rows = [
            matmul(dh_rF, weights[tile.expert]) for dh_rF, tile in zip(dh_tiles, plan, strict=True)
        ]
        dx = stack_rows(rows, num_rows)
        if slot_row is not None:
            ones_TK = torch.ones(slot_row.shape, dtype=at_least_float32(dx), device=dx.device)
            dx = gather_sum(dx, ones_TK, slot_row)

    dw = ExpertSum(weight.shape, weight, want_w)
    db = ExpertSum(weight.shape[:2], weight, want_b)
    x_tiles = gathered(x, row_token, plan) if want_w and x is not None else dh_tiles
    for dh_rF, x_rD, (expert, *_) in zip(dh_tiles, x_tiles, plan, strict=True):
        if want_w:
            dw.add(expert, matmul(dh_rF.t(), x_rD))
        if want_b:
            db.add(expert, dh_rF.sum(0))
    return dx, dw.total(), db.total()


def gathered(tokens_TD: Tensor, row_token: Tensor | None, plan: list[Tile]) -> tuple[Tensor, ...]:
    """The token of every row, tile by tile; the rows themselves if they are in order already."""
    stop = plan[-1].stop
    if row_token is None:
        return split_rows(tokens_TD[:stop], plan)
    return split_rows(tokens_TD.index_select(0, row_token[:stop]), plan)


@custom_op("ironmoe::grouped_matmul", mutates_args=())
def grouped_matmul_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    tiles_2n: Tensor | None,
    row_token: Tensor | None,
    slot_row: Tensor | None,
    activation: str,
    keep_hidden: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(H (R, N | 2N), A (R, N)); empty where not kept, or where the activation is "none".
    ``slot_row`` serves the backward pass. Without tiles a kernel plans its own."""
    num_rows = x.shape[0] if row_token is None else row_token.shape[0]
    if takes_triton(x):
        from ironmoe.kernels.gpu import grouped_matmul as gpu

        hidden, activated = gpu.grouped_matmul(
            x,
            weight,
            bias,
            offsets,
            tiles_2n,
            row_token=row_token,
            activation=activation,
            keep_hidden=keep_hidden,
            precision=precision,
        )
    else:
        plan = list(tiles(offsets, weight.shape[1] * x.element_size()))
        hidden = stack_rows(product_tiles(x, weight, bias, row_token, plan), num_rows)
        activated = None if activation == "none" else ACTIVATIONS[activation].value(hidden)
    return or_empty(hidden if keep_hidden else None, x), or_empty(activated, x)


@grouped_matmul_op.register_fake
def _(  # type: ignore[no-untyped-def]
    x, weight, bias, offsets, tiles_2n, row_token, slot_row, activation, keep_hidden, precision
):
    num_rows, wide = x.shape[0] if row_token is None else row_token.shape[0], weight.shape[1]
    hidden = x.new_empty(num_rows, wide) if keep_hidden else x.new_empty(0)
    if activation == "none":
        return hidden, x.new_empty(0)
    return hidden, x.new_empty(num_rows, wide // 2 if ACTIVATIONS[activation].gated else wide)


@custom_op("ironmoe::grouped_matmul_backward", mutates_args=())
def grouped_matmul_backward_op(
    dh: Tensor,
    x: Tensor | None,
    weight: Tensor,
    offsets: Tensor,
    tiles_2n: Tensor | None,
    row_token: Tensor | None,
    slot_row: Tensor | None,
    precision: str,
    want_x: bool,
    want_w: bool,
    want_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dW, db), each empty where not wanted."""
    if takes_triton(dh):
        from ironmoe.kernels.gpu import combine, weight_gradient
        from ironmoe.kernels.gpu import grouped_matmul as gpu

        dx = dw = db = None
        if want_x:
            dx, _ = gpu.grouped_matmul(
                dh, weight.transpose(1, 2), None, offsets, tiles_2n, precision=precision
            )
            dx = dx if slot_row is None or dx is None else combine.combine(dx, None, slot_row)
        if want_w and x is not None:
            dw = weight_gradient.weight_gradient(dh, None, x, row_token, offsets, precision)
        if want_b:
            db = weight_gradient.expert_sum(dh, offsets)
    else:
        plan = list(tiles(offsets, weight.shape[1] * dh.element_size()))
        dh_tiles = split_rows(dh[: plan[-1].stop], plan)
        dx, dw, db = product_tiles_backward(
            dh_tiles,
            x,
            weight,
            row_token,
            slot_row,
            num_rows=len(dh),
            plan=plan,
            want=(want_x, want_w, want_b),
        )
    return or_empty(dx, dh), or_empty(dw, dh), or_empty(db, dh)


@grouped_matmul_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    dh,
    x,
    weight,
    offsets,
    tiles_2n,
    row_token,
    slot_row,
    precision,
    want_x,
    want_w,
    want_b,
):
    tokens = dh.shape[0] if slot_row is None else slot_row.shape[0]
    return (
        dh.new_empty(tokens, weight.shape[2]) if want_x else dh.new_empty(0),
        dh.new_empty(weight.shape) if want_w else dh.new_empty(0),
        dh.new_empty(weight.shape[:2]) if want_b else dh.new_empty(0),
    )


def or_empty(result: Tensor | None, like: Tensor) -> Tensor:
    """The result, or an empty tensor in place of one that is not wanted: an operator always has
    the same number of outputs."""
    return like.new_empty(0) if result is None else result


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, offsets, tiles_2n, row_token, slot_row, _, _, ctx.precision = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] else None, weight, offsets, tiles_2n, row_token, slot_row
    )


def _backward(ctx: Any, dh: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, offsets, tiles_2n, row_token, slot_row = ctx.saved_tensors
    want = demanded(ctx, (True, True, ctx.has_bias))
    if dh is None or not any(want):
        return (None,) * 10
    if torch.is_grad_enabled():  # create_graph: what is recorded here must have derivatives itself
        plan = list(tiles(offsets, weight.shape[1] * weight.element_size()))
        dh_tiles = split_rows(dh[: plan[-1].stop], plan)
        grads = product_tiles_backward(
            dh_tiles, x, weight, row_token, slot_row, num_rows=len(dh), plan=plan, want=want
        )
        return (*grads, *(None,) * 7)
    want_x, want_w, want_b = want
    results = grouped_matmul_backward_op(
        dh,
        x,
        weight,
        offsets,
        tiles_2n,
        row_token=row_token,
        slot_row=slot_row,
        precision=ctx.precision,
        want_x=want_x,
        want_w=want_w,
        want_b=want_b,
    )
    return (
        *(result if wanted else None for result, wanted in zip(results, want, strict=True)),
        *(None,) * 7,
    )


grouped_matmul_op.register_autograd(_backward, setup_context=_setup)
