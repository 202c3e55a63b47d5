"""A bound is never below what is found on its ball, and is reached where it can be."""

import itertools
import math

import pytest
import torch
from torch import nn

from ironmoe.attacks.smoothness.bounds.activation_slopes import (
    ACTIVATION_SLOPES,
    activation_slope,
)
from ironmoe.attacks.smoothness.bounds.forced_cell import forced_cell_bound, layer_norm_radius
from ironmoe.kernels import ACTIVATIONS, Routing
from ironmoe.moe import Capacity, MoE, TopKRouter, intervene
from ironmoe.moe.routing.gates import gates_for

wide = {"dtype": torch.float64}
D = 5


def layer_of(seed=0, experts=4, top_k=2, activation="gelu_tanh", router=None, **options):
    torch.manual_seed(seed)
    gates = TopKRouter(D, experts, top_k, noise_std=0, load_weight=0.0, **(router or {}))
    layer = MoE(D, 7, experts, top_k, activation=activation, router=gates, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, **wide))
    return layer.eval()


def in_cell(layer, cell):
    """The layer, every token of which has the experts of the cell."""

    def force(decision):
        experts_TK = torch.tensor(cell).expand(len(decision.x), -1)
        return Routing(gates_for(decision, experts_TK, "own", decision.logits), experts_TK)

    def run(x):
        with intervene(layer, force):
            return layer(x)

    return run


def jacobians(f, x):
    point = x.clone().requires_grad_()
    y = f(point)
    rows = [torch.autograd.grad(z.sum(), point, create_graph=True)[0] for z in y.unbind(1)]
    return torch.stack(rows, 1)


def ball(count, radius, seed=0):
    """Points of the ball, more of them near its surface than a uniform draw has."""
    generator = torch.Generator().manual_seed(seed)
    direction = nn.functional.normalize(torch.randn(count, D, **wide, generator=generator), dim=1)
    return radius * direction * torch.rand(count, 1, **wide, generator=generator) ** 0.2


def steepest(f, radius, steps=5):
    """The largest ‖J‖₂ found on the ball, by ascent from random points."""
    x, largest = ball(24, radius), 0.0
    for _ in range(steps):
        x = x.detach().requires_grad_()
        found = torch.linalg.matrix_norm(jacobians(f, x), 2)
        largest = max(largest, float(found.max()))
        (slope,) = torch.autograd.grad(found.sum(), x)
        x = x + 0.2 * max(radius, 0.1) * nn.functional.normalize(slope, dim=1)
        x = x * (radius / x.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    return largest


OPTIONS = {
    "source": {}, "renormalised": {"router": {"renormalize": True}},
    "top-k first": {"router": {"order": "topk_first"}}, "scaled": {"router": {"scale": 2.5}},
    "router bias": {"router": {"bias": True}}, "one expert": {"top_k": 1},
    "all experts": {"top_k": 4, "router": {"renormalize": True}}, "no bias": {"bias": False},
    "shared": {"shared_dim": 6}, "gated shared": {"shared_dim": 6, "shared_gate": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("radius", [0.3, 3.0])
def test_no_derivative_on_the_ball_is_above_the_bound(name, radius):
    layer = layer_of(**OPTIONS[name])
    worst = forced_cell_bound(layer, radius)
    assert worst.total == pytest.approx(worst.experts + worst.gates + worst.shared)
    cells = list(itertools.combinations(range(4), layer.router.top_k))
    bounds = {cell: forced_cell_bound(layer, radius, experts=cell).total for cell in cells}
    assert max(bounds.values()) <= worst.total * (1 + 1e-12)
    highest = max(cells, key=bounds.get)
    assert 0 < steepest(in_cell(layer, highest), radius) <= bounds[highest]


@pytest.mark.parametrize("activation", ACTIVATION_SLOPES)
def test_no_secant_on_the_ball_is_above_the_bound(activation):
    layer = layer_of(activation=activation)
    f = in_cell(layer, (1, 3))
    for radius in (0.3, 3.0):
        bound = forced_cell_bound(layer, radius, experts=(1, 3)).total
        a, b = ball(400, radius), ball(400, radius, seed=1)
        near = a + 1e-3 * (b - a)
        with torch.no_grad():
            for other in (b, near):
                secants = (f(a) - f(other)).norm(dim=1) / (a - other).norm(dim=1)
                assert float(secants.max()) <= bound


def test_it_grows_with_the_ball_and_shrinks_with_knowledge_of_the_cell():
    layer = layer_of()
    radii = [0.0, 0.1, 1.0, 10.0]
    totals = [forced_cell_bound(layer, radius).total for radius in radii]
    assert totals == sorted(totals)
    renormalised = layer_of(router={"renormalize": True}, top_k=1)
    bound = forced_cell_bound(renormalised, 2.0)
    slopes = torch.linalg.matrix_norm(renormalised.fc1.weight.double(), 2)
    slopes = slopes * torch.linalg.matrix_norm(renormalised.fc2.weight.double(), 2)
    assert bound.gates == 0  # a gate that is always 1
    assert bound.experts == pytest.approx(activation_slope("gelu_tanh") * float(slopes.max()))


def test_it_is_reached_by_one_expert_of_parallel_weights():
    """W₂ relu(W₁ x) with multiples of the identity, where every unit is on."""
    layer = MoE(D, D, 1, 1, activation="relu").double().eval()
    with torch.no_grad():
        layer.fc1.weight.copy_(3 * torch.eye(D))
        layer.fc2.weight.copy_(2 * torch.eye(D))
    bound = forced_cell_bound(layer, 1.0)
    assert bound.total == pytest.approx(6) and bound.gates == 0
    x = torch.full((2, D), 0.1, **wide) * torch.tensor([[1.0], [2.0]])
    with torch.no_grad():
        y = layer(x)
    assert float((y[0] - y[1]).norm() / (x[0] - x[1]).norm()) == pytest.approx(6)


def test_the_gate_part_is_reached_by_two_constant_experts_that_are_opposite():
    """J = p (1 − p) (f₁ − f₂) (s₁ − s₂)ᵀ, largest at p = ½."""
    layer = MoE(D, 1, 2, 2, router=TopKRouter(D, 2, 2)).double().eval()
    output, rows = torch.randn(D, **wide), torch.randn(2, D, **wide)
    with torch.no_grad():
        layer.fc1.weight.zero_()
        layer.fc2.bias.copy_(torch.stack([output, -output]))
        layer.router.weight.copy_(rows)
    expected = float(output.norm() * (rows[0] - rows[1]).norm()) / 2
    (found,) = jacobians(layer, torch.zeros(1, D, **wide))
    assert float(torch.linalg.matrix_norm(found, 2)) == pytest.approx(expected)
    for radius in (0.0, 2.0):
        assert forced_cell_bound(layer, radius).total == pytest.approx(expected)


def test_a_scale_of_the_gates_scales_it():
    plain, scaled = (layer_of(router={"scale": scale}) for scale in (1.0, 2.5))
    for cell in (None, (0, 3)):
        single, more = (forced_cell_bound(layer, 2.0, experts=cell) for layer in (plain, scaled))
        assert more.experts == pytest.approx(2.5 * single.experts)
        assert more.gates == pytest.approx(2.5 * single.gates)


def test_the_part_of_a_shared_expert_is_reached_by_a_constant_one_and_by_one_without_a_slope():
    layer = layer_of(shared_dim=3, shared_gate=True, activation="relu")
    with torch.no_grad():
        layer.fc2.weight.zero_()
        layer.fc2.bias.zero_()
        layer.shared.fc1.weight.zero_()
    output = layer.shared(torch.zeros(1, D, **wide)).detach()
    expected = float(output.norm() * layer.shared_gate.weight.norm()) / 4
    (found,) = jacobians(layer, torch.zeros(1, D, **wide))
    assert float(torch.linalg.matrix_norm(found, 2)) == pytest.approx(expected)
    bound = forced_cell_bound(layer, 1.0)
    assert bound.total == bound.shared == pytest.approx(expected)

    with torch.no_grad():
        layer.shared_gate.weight.zero_()
        layer.shared.fc1.weight.copy_(torch.eye(3, D))
    slope = float(torch.linalg.matrix_norm(layer.shared.fc2.weight, 2))
    assert forced_cell_bound(layer, 1.0).shared == pytest.approx(slope / 2)


def test_behind_a_layer_norm_every_token_lies_in_the_ball():
    torch.manual_seed(0)
    norm = nn.LayerNorm(6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6))
        norm.bias.copy_(torch.randn(6))
    radius = layer_norm_radius(norm)
    assert (
        norm(10 ** torch.randn(500, 1, **wide) * torch.randn(500, 6, **wide)).norm(dim=1).max()
        <= radius
    )
    plain = nn.LayerNorm(6, elementwise_affine=False).double()
    assert layer_norm_radius(plain) == pytest.approx(math.sqrt(6))
    assert float(plain(1e6 * torch.randn(1, 6, **wide)).norm()) == pytest.approx(math.sqrt(6))


@pytest.mark.parametrize("name", ACTIVATION_SLOPES)
def test_slopes_of_activations(name):
    h = torch.linspace(-30, 30, 600_001, **wide).requires_grad_()
    (slopes,) = torch.autograd.grad(ACTIVATIONS[name].value(h).sum(), h)
    largest = float(slopes.abs().max())
    # between grid points of distance 1e-4 a slope of curvature ≤ 2 rises by less than 1e-8
    assert largest <= ACTIVATION_SLOPES[name] <= largest + 1e-8


def test_all_activations_without_a_largest_slope_are_refused():
    for name in ACTIVATIONS.keys() - ACTIVATION_SLOPES.keys():
        assert ACTIVATIONS[name].gated or name == "relu2"
        with pytest.raises(ValueError, match="activation must be one of"):
            activation_slope(name)


class OwnRouter(TopKRouter):
    pass


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, TypeError, "layer must be an MoE, got Linear"),
        (lambda: layer_of(capacity=Capacity(4.0)), {}, ValueError, "no capacity"),
        (lambda: layer_of(dispatch_dtype=torch.bfloat16), {}, ValueError, "dispatch_dtype"),
        (lambda: layer_of(router={"score": "sigmoid"}), {}, ValueError, "scores by softmax"),
        (lambda: layer_of(router={"softcap": 5.0}), {}, ValueError, "softcap"),
        (lambda: layer_of(router={"renormalize": 2.0}), {}, ValueError, "renormalize"),
        (lambda: MoE(D, 3, 4, router=OwnRouter(D, 4, 2)), {}, ValueError, "TopKRouter"),
        (lambda: layer_of(activation="relu2"), {}, ValueError, "activation must be one of"),
        (lambda: MoE(D, 3, 4, activation="swiglu"), {}, ValueError, "activation must be one of"),
        (layer_of, {"radius": math.inf}, ValueError, "radius must be finite"),
        (layer_of, {"radius": -1.0}, ValueError, "radius must be finite and at least 0"),
        (layer_of, {"experts": (1, 1)}, ValueError, "experts must be different"),
        (layer_of, {"experts": (4,)}, ValueError, "experts must be different numbers from 0 to 3"),
        (layer_of, {"experts": ()}, ValueError, "at least one"),
    ],
)
def test_where_it_is_not_proved_it_is_refused(make, options, error, message):
    with pytest.raises(error, match=message):
        forced_cell_bound(make(), options.pop("radius", 1.0), **options)


def test_norms_of_other_axes_are_refused():
    with pytest.raises(ValueError, match="last axis alone"):
        layer_norm_radius(nn.LayerNorm((2, 3)))
    with pytest.raises(TypeError, match="must be an nn"):
        layer_norm_radius(nn.Identity())
