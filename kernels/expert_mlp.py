"""The two-layer expert: y_t = Σ_k gates[t, k] · (W₂ₑ act(W₁ₑ x_t + b₁ₑ) + b₂ₑ), with the gradient
contract.

Two autograd nodes, joined by the pre-activations H:

    x ── up: H = W₁ x + b₁ ── down: y = Σ gates · (W₂ act(H) + b₂)

Work follows demand: each backward computes exactly the gradients the running autograd call will
use, also under ``autograd.grad(loss, [x])`` while the weights require grad. Saved: H, gates and
indices; ``x`` only if W₁ requires grad. Both backward passes are made of differentiable operations
on what was saved, so derivatives of any order are right.

On a GPU the nodes are the operators ``ironmoe::grouped_matmul`` and ``ironmoe::expert_down``. On
CPU they are ``_Up`` and ``_Down``, whose H is one tensor a tile: fresh memory for all of it at once
would cost as much as the product that fills it.
"""

from typing import Any

import torch
from torch import Tensor

from ironmoe.kernels.activations import Activation, get_activation
from ironmoe.kernels.autograd.demand import demanded, with_own_node
from ironmoe.kernels.autograd.recompute import recomputed
from ironmoe.kernels.autograd.transforms import by_folding, takes_folding
from ironmoe.kernels.checks import check_experts, check_like
from ironmoe.kernels.combine import gather_sum
from ironmoe.kernels.dispatch import plan_dispatch, plan_with_tiles, tiles_ahead
from ironmoe.kernels.expert_down import down_tiles, down_tiles_backward, expert_down_op
from ironmoe.kernels.grouped_matmul import (
    grouped_matmul_op,
    product_tiles,
    product_tiles_backward,
)
from ironmoe.kernels.onnx_graph import grouped_rows
from ironmoe.kernels.route import (
    autocast_dtype,
    check_precision,
    forward_mode,
    onnx_exporting,
    recorded_by_jit,
    takes_operators,
    transformed,
    without_autocast,
)
from ironmoe.kernels.tiles import Tile, tiles
from ironmoe.kernels.types import Dispatch, Routing


def expert_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Routing,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: str = "gelu",
    dispatch: Dispatch | None = None,
    recompute: bool = False,
    precision: str = "ieee",
) -> Tensor:
    """Every token through its chosen experts, weighted by its gates.

    Args:
        x: (T, D), float16, bfloat16, float32 or float64. Under autocast x, weights and biases are
            cast, gates are not.
        w_in: (E, F, D), or (E, 2F, D) for a gated activation: [gate | up], or gate, up, gate, up …
            where its name ends in "_interleaved"; any strides.
        w_out: (E, D, F); any strides.
        routing: gates (T, K) and experts (T, K); a choice with ``experts == E`` is dropped.
        b_in: (E, F) or (E, 2F).
        b_out: (E, D).
        activation: a name in ``ironmoe.kernels.ACTIVATIONS``.
        dispatch: ``plan_dispatch(routing.experts, E)`` if it is at hand already.
        recompute: keep x for the backward pass instead of H, which is then computed again: T·D
            numbers in place of R·F (or R·2F), for one more product. Inside torch.compile its
            partitioner decides what is kept.
        precision: float32 products on a GPU: "ieee", or "tf32" for tensor cores with 10 bits of
            mantissa.

    Returns:
        (T, D) in the dtype of ``x``. Differentiable to any order with respect to x, gates, weights
        and biases.

    Raises:
        ValueError: shapes, dtypes, devices, the activation or the precision do not belong together.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        w_in = w_in.to(dtype)
        w_out = w_out.to(dtype)
        b_in = None if b_in is None else b_in.to(dtype)
        b_out = None if b_out is None else b_out.to(dtype)
    act = get_activation(activation)
    check_precision(precision)
    _check(x, w_in, w_out, routing, b_in=b_in, b_out=b_out, act=act)

    inputs: Any = (x, routing.gates, w_in, w_out, b_in, b_out)
    with without_autocast(x):
        if takes_folding():
            return by_folding(expert_mlp, inputs, routing.experts, activation, recompute, precision)
        plainly = transformed() or forward_mode() or recorded_by_jit()
        if takes_operators(x) and not plainly:
            if dispatch is None:
                dispatch, cut = plan_with_tiles(routing.experts, w_in.shape[0], x.dtype)
            else:
                cut = tiles_ahead(dispatch.offsets, dispatch.row_token.shape[0], x.dtype)
            return _by_operators(inputs, activation, dispatch, cut, recompute, precision)
        if dispatch is None:
            dispatch = plan_dispatch(routing.experts, w_in.shape[0])
        if onnx_exporting():
            return _by_experts(inputs, act, dispatch)
        if plainly:
            return _plainly(inputs, act, dispatch)
        return _by_tiles(inputs, act, dispatch, recompute)


def _plainly(inputs: Any, act: Activation, dispatch: Dispatch) -> Tensor:
    """Both layers of one tile, then the next tile, in torch operations that every transform knows.
    Without gradients H never leaves the cache, and none of it is kept."""
    x, gates, w_in, w_out, b_in, b_out = inputs
    plan = list(tiles(dispatch.offsets, w_in.shape[1] * w_in.element_size()))
    hidden = product_tiles(x, w_in, b_in, dispatch.row_token, plan)
    return down_tiles(gates, w_out, b_out, map(act.value, hidden), dispatch.slot_row, plan)


def _by_experts(inputs: Any, act: Activation, dispatch: Dispatch) -> Tensor:
    """Both layers in operations that ONNX has."""
    x, gates, w_in, w_out, b_in, b_out = inputs
    hidden = grouped_rows(x[dispatch.row_token.long()], w_in, b_in, dispatch.offsets)
    rows = grouped_rows(act.value(hidden), w_out, b_out, dispatch.offsets)
    return gather_sum(rows, gates, dispatch.slot_row)


def _by_operators(
    inputs: Any,
    activation: str,
    dispatch: Dispatch,
    cut: Tensor | None,
    recompute: bool,
    precision: str,
) -> Tensor:
    """Both layers as registered operators; ``cut`` is ``tiles_ahead`` of the dispatch."""
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    x, gates, w_in, w_out, b_in, b_out = [with_own_node(t) for t in inputs] if records else inputs
    offsets, row_token, row_slot, slot_row = dispatch

    def up(x: Tensor, w_in: Tensor, b_in: Tensor | None) -> tuple[Tensor, Tensor]:
        return grouped_matmul_op(
            x,
            w_in,
            b_in,
            offsets,
            cut,
            row_token=row_token,
            slot_row=slot_row,
            activation=activation,
            keep_hidden=records,
            precision=precision,
        )

    sources = (x, w_in, b_in)
    hidden, activated = up(*sources)
    with recomputed((hidden,), lambda *again: up(*again)[:1], sources, recompute and records):
        return expert_down_op(
            gates,
            w_out,
            b_out,
            hidden,
            activated,
            offsets,
            tiles_2n=cut,
            row_token=row_token,
            row_slot=row_slot,
            slot_row=slot_row,
            activation=activation,
            precision=precision,
        )


def _by_tiles(inputs: Any, act: Activation, dispatch: Dispatch, recompute: bool) -> Tensor:
    """Both layers as loops over tiles on CPU; ``_plainly`` where no gradient is recorded."""
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)):
        return _plainly(inputs, act, dispatch)
    x, gates, w_in, w_out, b_in, b_out = [with_own_node(t) for t in inputs]
    plan = list(tiles(dispatch.offsets, w_in.shape[1] * w_in.element_size()))
    hidden = _Up.apply(x, w_in, b_in, dispatch, plan)
    with recomputed(
        hidden,
        lambda x, w_in, b_in: product_tiles(x, w_in, b_in, dispatch.row_token, plan),
        (x, w_in, b_in),
        recompute,
    ):
        return _Down.apply(gates, w_out, b_out, *hidden, act, dispatch, plan)


class _Up(torch.autograd.Function):
    """(x, w_in, b_in) → H, one tensor a tile. It is linear, so its backward needs no H; it needs x
    only for the gradient of W₁."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_in: Tensor, b_in: Tensor | None, dispatch: Dispatch, plan: list[Tile]
    ) -> Any:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w_in)
        ctx.given = (True, True, b_in is not None)
        ctx.dispatch = dispatch
        ctx.plan = plan
        return product_tiles(x, w_in, b_in, dispatch.row_token, plan)

    @staticmethod
    def backward(ctx: Any, *dh_tiles: Tensor) -> Any:
        x, w_in = ctx.saved_tensors
        _, row_token, _, slot_row = ctx.dispatch
        grads = product_tiles_backward(
            dh_tiles,
            x,
            w_in,
            row_token,
            slot_row,
            num_rows=row_token.numel(),
            plan=ctx.plan,
            want=demanded(ctx, ctx.given),
        )
        return *grads, None, None


class _Down(torch.autograd.Function):
    """(gates, w_out, b_out, H) → y."""

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, w_out: Tensor, b_out: Tensor | None, *hidden_act_dispatch_plan: Any
    ) -> Tensor:
        *hidden, act, dispatch, plan = hidden_act_dispatch_plan
        only_b_out = not any(ctx.needs_input_grad[i] for i in (0, 1, 3))
        ctx.save_for_backward(gates, w_out, b_out, *(() if only_b_out else hidden))
        # All tiles of H come from one node, so the first one answers for all: 4 entries are enough.
        ctx.given = (True, True, b_out is not None, True)
        ctx.act = act
        ctx.dispatch = dispatch
        ctx.plan = plan
        return down_tiles(gates, w_out, b_out, map(act.value, hidden), dispatch.slot_row, plan)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        gates, w_out, b_out, *hidden = ctx.saved_tensors
        want = demanded(ctx, ctx.given)
        *grads, dh_tiles = down_tiles_backward(
            dy, gates, w_out, b_out, hidden, ctx.dispatch, act=ctx.act, plan=ctx.plan, want=want
        )
        return *grads, *(dh_tiles or (None,) * len(ctx.plan)), None, None, None


def _check(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Routing,
    *,
    b_in: Tensor | None,
    b_out: Tensor | None,
    act: Activation,
) -> None:
    """ValueError that names the argument which does not fit the others."""
    check_experts(x, w_in, b_in, "w_in", "b_in")
    num_experts, wide, dim = w_in.shape
    if act.gated and wide % 2:
        raise ValueError(
            "w_in must have an even number of rows an expert, gate and up, for a gated "
            f"activation, got {wide}"
        )
    expected = (num_experts, dim, wide // 2 if act.gated else wide)
    if w_out.shape != expected:
        raise ValueError(
            f"w_out must have shape {expected} to match w_in and the activation, got "
            f"{tuple(w_out.shape)}"
        )
    check_like(x, w_out, "w_out")
    if b_out is not None:
        if b_out.shape != (num_experts, dim):
            raise ValueError(
                f"b_out must be of shape {(num_experts, dim)} to match w_in, got "
                f"{tuple(b_out.shape)}"
            )
        check_like(x, b_out, "b_out")
    gates, experts = routing
    if gates.shape != experts.shape or gates.ndim != 2 or gates.shape[0] != x.shape[0]:
        raise ValueError(
            f"routing must hold gates and experts of one shape ({x.shape[0]}, K), got "
            f"{tuple(gates.shape)} and {tuple(experts.shape)}"
        )
