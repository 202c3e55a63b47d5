"""An upper bound of how fast one MoE layer changes while its tokens keep their experts.

In the cell of the experts T the layer is y(x) = Σ g_i(x) f_i(x) over T, and f_i(x) = W₂ act(W₁ x +
b₁) + b₂. Its derivative is Σ g_i ∂f_i + Σ f_i ∂g_iᵀ. On the ball ‖x‖ ≤ R:

- ‖∂f_i‖ ≤ L_i = ‖W₂‖ a ‖W₁‖, a the largest slope of the activation.
- ‖f_i(x)‖ ≤ F_i = ‖f_i(0)‖ + L_i R.
- g = softmax(Sx + b), over all experts, or over T where gates are renormalised. Since two logits
  differ by at least (b_j − b_i) − R ‖s_j − s_i‖, g_i ≤ ĝ_i = 1 / (1 + Σ_j exp(…)). All gates
  together are at most 1.
- ∂g_i = g_i Σ_j g_j (s_i − s_j), so ‖∂g_i‖ ≤ g_i (1 − g_i) D_i, D_i the largest ‖s_i − s_j‖; and
  g (1 − g) for g ≤ ĝ is at most ĝ (1 − ĝ), or ¼ where ĝ ≥ ½.

So the derivative is at most max Σ g_i L_i over gates within their limits, plus Σ F_i D_i g_i (1 −
g_i). A ball is convex, and so this bounds every secant in it, too: ‖y(x) − y(x′)‖ ≤ bound ·
‖x − x′‖. It says nothing of jumps from cell to cell.

Shape suffixes: E experts, F hidden width, D width of a token.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks.smoothness.bounds.activation_slopes import activation_slope
from ironmoe.kernels.activations import get_activation
from ironmoe.moe import MoE, TopKRouter
from ironmoe.moe.layers.expert_linear import with_weights
from ironmoe.moe.routers.wrapped import unwrapped


class LayerBound(NamedTuple):
    """Upper bounds on the ball ‖x‖ ≤ ``radius``, from L2 to L2, up to rounding in float64.

    total:   of the derivative of the layer, and so of its Lipschitz constant in a cell
    experts: of the part with constant gates
    gates:   of the part with constant experts
    shared:  of the shared expert; 0 without one
    """

    total: float
    experts: float
    gates: float
    shared: float
    radius: float


def forced_cell_bound(
    layer: MoE, radius: float, *, experts: Sequence[int] | None = None
) -> LayerBound:
    """An upper bound of the Lipschitz constant of an MoE layer, without its residual path, for
    tokens of length at most ``radius`` that keep their experts.

    Args:
        layer: with a ``TopKRouter`` that scores by softmax, and an activation of bounded slope; it
            is taken in eval mode, without noise.
        radius: R, finite. Behind a layer norm ``layer_norm_radius(norm)`` holds for every token.
        experts: the cell. None: the worst of all cells of K experts.

    Returns:
        ``LayerBound``. It is not tight: products of norms are reached by no trained layer.

    Raises:
        ValueError: a layer for which it is not proved: a capacity, ``dispatch_dtype``, another
            router, score or norm of the gates, a gated activation; a radius that is not finite;
            experts that are none or named twice.
        TypeError: the layer is no MoE.
    """
    router = _checked_router(layer)
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius must be finite and at least 0, got {radius}")
    cell = _checked_cell(experts, layer.num_experts)

    slopes_E, lengths_E = _of_experts(layer, radius)
    limits_E, spans_E = _of_gates(router, radius, cell)

    here = slice(None) if cell is None else cell
    limits, of_gates = limits_E[here], (lengths_E * spans_E * _curvature(limits_E))[here]
    count = router.top_k if cell is None else len(cell)
    scale = abs(router.scale)
    expert_part = scale * _largest_mean(slopes_E[here], limits)
    gate_part = scale * float(of_gates.sort(descending=True).values[:count].sum())
    shared_part = _of_shared(layer, radius)
    total = expert_part + gate_part + shared_part
    return LayerBound(total, expert_part, gate_part, shared_part, float(radius))


def layer_norm_radius(norm: nn.LayerNorm) -> float:
    """√D max|γ| + ‖β‖, which no output of a layer norm exceeds in length: before γ and β, D numbers
    of mean 0 have a variance of at most 1.

    Raises:
        TypeError: it is no ``nn.LayerNorm``.
        ValueError: it runs over more axes than the last.
    """
    if not isinstance(norm, nn.LayerNorm):
        raise TypeError(f"norm must be an nn.LayerNorm, got {type(norm).__name__}")
    if len(norm.normalized_shape) != 1:
        raise ValueError(
            f"norm must run over the last axis alone, got normalized_shape={norm.normalized_shape}"
        )
    (dim,) = norm.normalized_shape
    largest = 1.0 if norm.weight is None else float(norm.weight.detach().double().abs().max())
    shift = 0.0 if norm.bias is None else float(norm.bias.detach().double().norm())
    return math.sqrt(dim) * largest + shift


def _checked_router(layer: Any) -> TopKRouter:
    if not isinstance(layer, MoE):
        raise TypeError(f"layer must be an MoE, got {type(layer).__name__}")
    router = unwrapped(layer.router)
    if type(router) is not TopKRouter or router.score != "softmax":
        raise ValueError(
            "layer must have a TopKRouter that scores by softmax for its bound to hold, got "
            f"{router}"
        )
    if router.softcap is not None or not isinstance(router.renormalize, bool):
        raise ValueError(
            "layer must have a router without a softcap and with renormalize True or False for its "
            f"bound to hold, got softcap={router.softcap}, renormalize={router.renormalize}"
        )
    if layer.capacity is not None or layer.dispatch_dtype is not None:
        raise ValueError(
            "layer must have no capacity and no dispatch_dtype for its bound to hold, got "
            f"capacity={layer.capacity}, dispatch_dtype={layer.dispatch_dtype}"
        )
    return router


def _checked_cell(experts: Sequence[int] | None, num_experts: int) -> list[int] | None:
    if experts is None:
        return None
    cell = sorted({int(expert) for expert in experts})
    if not cell or len(cell) != len(experts) or not 0 <= cell[0] <= cell[-1] < num_experts:
        raise ValueError(
            f"experts must be different numbers from 0 to {num_experts - 1}, at least one, got "
            f"{list(experts)}"
        )
    return cell


@torch.no_grad()
def _of_experts(layer: MoE, radius: float) -> tuple[Tensor, Tensor]:
    """(L, F), both (E,) float64: slopes, and lengths of outputs."""
    weights: list[Tensor | None] = []

    def keep(x: Tensor, *of_experts: Tensor | None) -> Tensor:
        weights.extend(w if w is None else w.detach().double().cpu().clone() for w in of_experts)
        return x

    probe = next(layer.parameters()).new_zeros(1, layer.dim)
    with_weights(layer.fc1, layer.fc2, probe, keep)
    return _of_two_layers(*weights, activation=layer.activation, radius=radius)


def _of_two_layers(
    w_in: Any, b_in: Any, w_out: Any, b_out: Any, *, activation: str, radius: float
) -> tuple[Tensor, Tensor]:
    """The same of stacked weights (E, F, D), (E, F), (E, D, F), (E, D)."""
    slope = activation_slope(activation)
    slopes_E = slope * torch.linalg.matrix_norm(w_in, 2) * torch.linalg.matrix_norm(w_out, 2)

    hidden_EF = torch.zeros_like(w_in[..., 0]) if b_in is None else b_in
    at_0_ED = (w_out @ get_activation(activation).value(hidden_EF)[..., None])[..., 0]
    if b_out is not None:
        at_0_ED = at_0_ED + b_out
    return slopes_E, at_0_ED.norm(dim=1) + slopes_E * radius


@torch.no_grad()
def _of_gates(router: TopKRouter, radius: float, cell: list[int] | None) -> tuple[Tensor, Tensor]:
    """(ĝ, D), both (E,) float64: the limits of gates, and the largest distance of a row of the
    router from one that it is compared with. They mean nothing for experts outside the cell."""
    rows_ED = router.weight.detach().double().cpu()
    bias = router.bias
    bias_E = torch.zeros_like(rows_ED[:, 0]) if bias is None else bias.detach().double().cpu()
    apart_EE = (rows_ED[:, None] - rows_ED).norm(dim=2)
    least_EE = (bias_E - bias_E[:, None] - radius * apart_EE).exp()  # of exp(l_j − l_i)

    compared_EE = ~torch.eye(len(rows_ED), dtype=torch.bool)
    rivals = len(rows_ED) - 1
    if router.renormalize is True or router.order == "topk_first":  # with experts of the cell alone
        rivals = (router.top_k if cell is None else len(cell)) - 1
        if cell is not None:
            compared_EE &= torch.isin(torch.arange(len(rows_ED)), torch.tensor(cell))

    # in an unknown cell those experts are rivals that leave the largest gate
    weakest_E = least_EE.where(compared_EE, math.inf).sort(dim=1).values[:, :rivals].sum(1)
    spans_E = apart_EE.where(compared_EE, 0).amax(1) * (rivals > 0)
    return 1 / (1 + weakest_E), spans_E


def _curvature(limits: Tensor) -> Tensor:
    """The largest g (1 − g) of gates up to these."""
    return torch.where(limits < 0.5, limits * (1 - limits), 0.25)


def _largest_mean(slopes: Tensor, limits: Tensor) -> float:
    """The largest Σ g L of gates g of at most ``limits`` each and 1 together: the steepest experts
    get as much as they may."""
    order = slopes.argsort(descending=True)
    before = limits[order].cumsum(0) - limits[order]
    gates = torch.minimum(limits[order], (1 - before).clamp_min(0))
    return float((gates * slopes[order]).sum())


@torch.no_grad()
def _of_shared(layer: MoE, radius: float) -> float:
    """Of the shared expert, whose gate σ(wᵀx) is at most σ(R ‖w‖) and has a slope of ¼ ‖w‖ or
    less."""
    if layer.shared is None:
        return 0.0
    weights = [
        parameter if parameter is None else parameter.detach().double().cpu()[None]
        for linear in (layer.shared.fc1, layer.shared.fc2)
        for parameter in (linear.weight, linear.bias)
    ]
    slope, length = _of_two_layers(*weights, activation=layer.activation, radius=radius)
    if layer.shared_gate is None:
        return float(slope)
    gate_row = float(layer.shared_gate.weight.detach().double().norm())
    return float(slope) / (1 + math.exp(-radius * gate_row)) + float(length) * gate_row / 4
