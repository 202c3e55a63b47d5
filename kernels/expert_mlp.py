"""The two-layer expert: y_t = Σ_k gates[t, k] · (W₂ₑ act(W₁ₑ x_t + b₁ₑ) + b₂ₑ), with the gradient contract.

Two autograd nodes, joined by the pre-activations H (one tensor a tile):

    x ── _Up: H = W₁ x + b₁ ── _Down: y = Σ gates · (W₂ act(H) + b₂)

Work follows demand: each backward computes exactly the gradients the running autograd call will use, also under
``autograd.grad(loss, [x])`` while the weights require grad. Saved: H, gates and indices; ``x`` only if W₁ requires grad.
Both backward passes are made of differentiable operations on what was saved, so derivatives of any order are right.

The gate gradient is ⟨dA′, A⟩ + ⟨dO, b₂⟩, taken before gating (SonicMoE, arXiv 2512.14080): exact where a gate is 0.
"""

import torch
from torch import Tensor

from ironmoe.kernels.activations import Activation, get_activation
from ironmoe.kernels.combine import gather_sum
from ironmoe.kernels.demand import demanded, with_own_node
from ironmoe.kernels.dispatch import Dispatch, plan_dispatch
from ironmoe.kernels.grouped_matmul import Tile, check_experts, matmul, per_expert, tile_rows, tiles
from ironmoe.kernels.topk import Routing


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
) -> Tensor:
    """Every token through its chosen experts, weighted by its gates.

    Args:
        x: (T, D), float16, bfloat16, float32 or float64. Under autocast x, weights and biases are cast, gates are not.
        w_in: (E, F, D), or (E, 2F, D) as [gate | up] for a gated activation.
        w_out: (E, D, F).
        routing: gates (T, K) and experts (T, K); a choice with ``experts == E`` is dropped.
        b_in: (E, F) or (E, 2F).
        b_out: (E, D).
        activation: a name in ``ironmoe.kernels.ACTIVATIONS``.
        dispatch: ``plan_dispatch(routing.experts, E)`` if it is at hand already.

    Returns:
        (T, D) in the dtype of ``x``. Differentiable to any order with respect to x, gates, weights and biases.

    Raises:
        ValueError: shapes, dtypes, devices or the activation do not belong together.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
        b_in = None if b_in is None else b_in.to(dtype)
        b_out = None if b_out is None else b_out.to(dtype)
    act = get_activation(activation)
    _check(x, w_in, w_out, routing, b_in, b_out, act)
    if dispatch is None:
        dispatch = plan_dispatch(routing.experts, w_in.shape[0])
    plan = list(tiles(dispatch.offsets, w_in.shape[1] * w_in.element_size()))
    inputs = (x, routing.gates, w_in, w_out, b_in, b_out)
    with torch.autocast(x.device.type, enabled=False):
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)):
            return _inference(x, routing.gates, w_in, w_out, b_in, b_out, act, dispatch, plan)
        own_x, own_gates, own_w_in, own_w_out, own_b_in, own_b_out = map(with_own_node, inputs)
        hidden = _Up.apply(own_x, own_w_in, own_b_in, dispatch, plan)
        return _Down.apply(own_gates, own_w_out, own_b_out, *hidden, act, dispatch, plan)


def _inference(
    x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None,
    act: Activation, dispatch: Dispatch, plan: list[Tile],
) -> Tensor:  # fmt: skip
    """Both layers of one tile before the next: H never leaves the cache and none of it is kept."""
    weights_in, weights_out = per_expert(w_in.transpose(1, 2)), per_expert(w_out.transpose(1, 2))
    biases_in, biases_out = per_expert(b_in, len(w_in)), per_expert(b_out, len(w_in))
    rows = []
    for x_rD, (expert, *_) in zip(_gathered(x, dispatch, plan), plan, strict=True):
        h_rF = matmul(x_rD, weights_in[expert], biases_in[expert], feeds_product=True)
        rows.append(matmul(act.value(h_rF), weights_out[expert], biases_out[expert]))
    return gather_sum(_stack_rows(rows, dispatch, plan), gates, dispatch.slot_row)


class _Up(torch.autograd.Function):
    """(x, w_in, b_in) → H, one tensor a tile. Linear, so its backward needs no H; it needs x for W₁ alone."""

    @staticmethod
    def forward(ctx, x, w_in, b_in, dispatch, plan):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w_in)
        ctx.given, ctx.dispatch, ctx.plan = (True, True, b_in is not None), dispatch, plan
        weights, biases = per_expert(w_in.transpose(1, 2)), per_expert(b_in, len(w_in))
        return tuple(
            matmul(x_rD, weights[tile.expert], biases[tile.expert], feeds_product=True)
            for x_rD, tile in zip(_gathered(x, dispatch, plan), plan, strict=True)
        )

    @staticmethod
    def backward(ctx, *dh_tiles):  # type: ignore[no-untyped-def]
        x, w_in = ctx.saved_tensors
        want_x, want_w, want_b = demanded(ctx, ctx.given)
        dx = None
        if want_x:
            weights = per_expert(w_in)
            rows = [matmul(dh_rF, weights[tile.expert]) for dh_rF, tile in zip(dh_tiles, ctx.plan, strict=True)]
            ones = torch.ones(ctx.dispatch.slot_row.shape, dtype=_at_least_float32(w_in), device=w_in.device)
            dx = gather_sum(_stack_rows(rows, ctx.dispatch, ctx.plan), ones, ctx.dispatch.slot_row)
        dw, db = _ExpertSum(w_in.shape, w_in, want_w), _ExpertSum(w_in.shape[:2], w_in, want_b)
        x_tiles = _gathered(x, ctx.dispatch, ctx.plan) if want_w else dh_tiles
        for dh_rF, x_rD, (expert, *_) in zip(dh_tiles, x_tiles, ctx.plan, strict=True):
            if want_w:
                dw.add(expert, matmul(dh_rF.t(), x_rD))
            if want_b:
                db.add(expert, dh_rF.sum(0))
        return dx, dw.total(), db.total(), None, None


class _Down(torch.autograd.Function):
    """(gates, w_out, b_out, H) → y."""

    @staticmethod
    def forward(ctx, gates, w_out, b_out, *hidden_act_dispatch_plan):  # type: ignore[no-untyped-def]
        *hidden, act, dispatch, plan = hidden_act_dispatch_plan
        only_b_out = not any(ctx.needs_input_grad[i] for i in (0, 1, 3))
        ctx.save_for_backward(gates, w_out, b_out, *(() if only_b_out else hidden))
        ctx.given = (True, True, b_out is not None, True)  # all of H comes from one node: its first tile speaks for it
        ctx.act, ctx.dispatch, ctx.plan = act, dispatch, plan
        weights, biases = per_expert(w_out.transpose(1, 2)), per_expert(b_out, len(w_out))
        rows = [
            matmul(act.value(h_rF), weights[tile.expert], biases[tile.expert]) for h_rF, tile in zip(hidden, plan, strict=True)
        ]
        return gather_sum(_stack_rows(rows, dispatch, plan), gates, dispatch.slot_row)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        gates, w_out, b_out, *hidden = ctx.saved_tensors
        act, dispatch, plan = ctx.act, ctx.dispatch, ctx.plan
        want_gates, want_w, want_b, want_h = demanded(ctx, ctx.given)
        weights, biases = per_expert(w_out), per_expert(b_out, len(w_out))
        exact = torch.promote_types(_at_least_float32(w_out), gates.dtype)
        rows = slice(plan[-1].stop)
        gates_R1 = gates[dispatch.row_token[rows].long(), dispatch.row_slot[rows].long()].unsqueeze(-1).to(exact)
        dy_RD = dy.index_select(0, dispatch.row_token[rows])
        dy_tiles = tile_rows(dy_RD, plan)
        gates_tiles = tile_rows(gates_R1, plan)
        if want_w or want_b or (want_h and not want_gates):
            gated_tiles = tile_rows((dy_RD * gates_R1).to(dy.dtype), plan)
        dgates_tiles, dh_tiles = [], []
        dw, db = _ExpertSum(w_out.shape, w_out, want_w), _ExpertSum(w_out.shape[:2], w_out, want_b)
        for i, (expert, *_) in enumerate(plan):
            if want_gates or want_w:
                a_rF = act.value(hidden[i])
            if want_gates:  # needs dA before gating; otherwise the gate goes in where the rows are narrow
                da_rF = matmul(dy_tiles[i], weights[expert], feeds_product=True)
                dgates_r = (da_rF.to(exact) * a_rF).sum(-1)
                if b_out is not None:
                    dgates_r = dgates_r + dy_tiles[i].to(exact) @ biases[expert].to(exact)
                dgates_tiles.append(dgates_r.unsqueeze(-1))
                da_rF = (da_rF * gates_tiles[i]).to(da_rF.dtype) if want_h else da_rF
            elif want_h:
                da_rF = matmul(gated_tiles[i], weights[expert], feeds_product=True)
            if want_h:
                dh_tiles.append(act.backward(da_rF, hidden[i]))
            if want_w:
                dw.add(expert, matmul(gated_tiles[i].t(), a_rF))
            if want_b:
                db.add(expert, gated_tiles[i].sum(0))
        dgates = None
        if want_gates:
            dgates_R = _stack_rows(dgates_tiles, dispatch, plan).squeeze(-1)
            dgates = dgates_R[dispatch.slot_row.clamp_min(0)].masked_fill(dispatch.slot_row < 0, 0).to(gates.dtype)
        return dgates, dw.total(), db.total(), *(dh_tiles or (None,) * len(plan)), None, None, None


class _ExpertSum:
    """A gradient of all experts' weights, summed over tiles in float32 at least; experts without rows get 0.

    In place, unless autograd records.
    """

    def __init__(self, shape: torch.Size, like: Tensor, wanted: bool) -> None:
        self.dtype = like.dtype
        self.sum = like.new_zeros(shape, dtype=_at_least_float32(like)) if wanted else None
        self.parts = [] if self.sum is None else list(self.sum.unbind(0))

    def add(self, expert: int, part: Tensor) -> None:
        if torch.is_grad_enabled():
            self.parts[expert] = self.parts[expert] + part
        else:
            self.parts[expert].add_(part)

    def total(self) -> Tensor | None:
        if self.sum is None:
            return None
        return (torch.stack(self.parts) if torch.is_grad_enabled() else self.sum).to(self.dtype)


def _gathered(tokens_TD: Tensor, dispatch: Dispatch, plan: list[Tile]) -> tuple[Tensor, ...]:
    """The token of every row, tile by tile."""
    return tile_rows(tokens_TD.index_select(0, dispatch.row_token[: plan[-1].stop]), plan)


def _stack_rows(tiles_rN: list[Tensor], dispatch: Dispatch, plan: list[Tile]) -> Tensor:
    """(R, N) from the rows of all tiles; the rows of dropped choices, at the end, are 0."""
    dropped = dispatch.row_token.numel() - plan[-1].stop
    return torch.cat([*tiles_rN, tiles_rN[0].new_zeros(dropped, tiles_rN[0].shape[1])])


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check(
    x: Tensor, w_in: Tensor, w_out: Tensor, routing: Routing, b_in: Tensor | None, b_out: Tensor | None, act: Activation
) -> None:
    check_experts(x, w_in, b_in, "w_in", "b_in")
    num_experts, wide, dim = w_in.shape
    if act.gated and wide % 2:
        raise ValueError(f"w_in must have an even number of rows an expert, [gate | up], for a gated activation, got {wide}")
    expected = (num_experts, dim, wide // 2 if act.gated else wide)
    if w_out.shape != expected:
        raise ValueError(f"w_out must have shape {expected} to match w_in and the activation, got {tuple(w_out.shape)}")
    if w_out.dtype != x.dtype or w_out.device != x.device:
        raise ValueError(f"w_out must be {x.dtype} on {x.device} like x, got {w_out.dtype} on {w_out.device}")
    if b_out is not None and (b_out.shape != (num_experts, dim) or b_out.dtype != x.dtype or b_out.device != x.device):
        raise ValueError(
            f"b_out must be {x.dtype} of shape {(num_experts, dim)} on {x.device}, got {b_out.dtype} of shape {tuple(b_out.shape)} on {b_out.device}"
        )
    gates, experts = routing
    if gates.shape != experts.shape or gates.ndim != 2 or gates.shape[0] != x.shape[0]:
        raise ValueError(
            f"routing must hold gates and experts of one shape ({x.shape[0]}, K), got {tuple(gates.shape)} and {tuple(experts.shape)}"
        )
