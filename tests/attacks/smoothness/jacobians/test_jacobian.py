"""Derivatives of models that are known, and of small V-MoEs beside their full Jacobian."""

import pytest
import torch
from smoothness_models import LinearlyRouted, dense, images_of, vmoe
from torch import nn
from torch.utils.checkpoint import checkpoint

from ironmoe.attacks import GatesOnly
from ironmoe.attacks.smoothness.jacobians.jacobian import jacobian
from ironmoe.attacks.smoothness.jacobians.matrix import jacobian_matrix, network_terms
from ironmoe.attacks.smoothness.routing_held import ROUTINGS
from ironmoe.moe import Capacity, MoE, SoftMoE, TopKRouter

wide = {"dtype": torch.float64}
NORMS = {"Linf": 1, "L2": 2, "L1": float("inf")}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **wide)


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def spectral(matrices):
    return torch.linalg.svdvals(matrices.flatten(2))[:, 0]


@pytest.mark.parametrize("norm", NORMS)
def test_of_a_linear_model_everything_is_known(norm):
    weight, x = normal(4, 6), normal(5, 6, seed=1)
    found = jacobian(Linear(weight), x, norm=norm)
    assert found.exact and found.passes.tolist() == [5] * 5
    torch.testing.assert_close(found.logits, x @ weight.T)
    torch.testing.assert_close(found.spectral, torch.linalg.matrix_norm(weight, 2).expand(5))
    torch.testing.assert_close(jacobian_matrix(Linear(weight), x), weight.expand(5, 4, 6))

    labels = (x @ weight.T).argmax(1)
    rows = weight[labels][:, None] - weight
    margins = (rows @ x[..., None])[..., 0]
    slopes = rows.norm(NORMS[norm], dim=2)
    torch.testing.assert_close(found.margins, margins)
    torch.testing.assert_close(found.margin_slopes, slopes)
    others = torch.arange(4) != labels[:, None]
    torch.testing.assert_close(found.radius, (margins / slopes).where(others, float("inf")).amin(1))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_radius_of_a_linear_model_is_where_the_class_changes(norm):
    weight, x = normal(4, 6), normal(5, 6, seed=1)
    model = Linear(weight)
    found = jacobian(model, x, norm=norm)
    rivals = (found.margins / found.margin_slopes).nan_to_num(float("inf")).argmin(1)
    toward = weight[rivals] - weight[found.labels]
    step = toward.sign() if norm == "Linf" else toward / toward.norm(dim=1, keepdim=True)
    for factor, changes in ((0.999, False), (1.001, True)):
        moved = x + factor * found.radius[:, None] * step
        assert ((model(moved).argmax(1) != found.labels) == changes).all()


def test_of_a_quadratic_model_the_jacobian_is_linear_in_the_image():
    matrix = normal(6, 6)
    matrix, x = matrix + matrix.T, normal(3, 6, seed=1)

    def quadratic(x):
        value = (x @ matrix * x).sum(1) / 2
        return torch.stack([value, 0 * value], 1)

    rows = x @ matrix
    found = jacobian(quadratic, x, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(found.spectral, rows.norm(dim=1))
    torch.testing.assert_close(found.margin_slopes[:, 1], rows.norm(1, dim=1))


def test_a_softmax_router_of_constant_experts_has_the_covariance_as_its_jacobian():
    """J = Cov_p(f, s), p = softmax(Sx): with K = E and gates that are not renormalised."""
    experts, dim, x = 5, 4, normal(3, 4, seed=1)
    layer = MoE(dim, 3, experts, experts, router=TopKRouter(dim, experts, experts)).double()
    outputs, rows = normal(experts, dim, seed=2), normal(experts, dim, seed=3)
    with torch.no_grad():
        layer.fc1.weight.zero_()
        layer.fc2.bias.copy_(outputs)
        layer.router.weight.copy_(rows)
    share = (x @ rows.T).softmax(1)
    mean_f, mean_s = share @ outputs, share @ rows
    covariance = torch.einsum(
        "be,bec,bed->bcd", share, outputs - mean_f[:, None], rows - mean_s[:, None]
    )
    torch.testing.assert_close(jacobian_matrix(layer, x), covariance)
    constant = jacobian_matrix(layer, x, routing="gates_frozen")
    torch.testing.assert_close(constant, torch.zeros_like(constant))
    torch.testing.assert_close(jacobian(layer, x).spectral, spectral(covariance))


def test_a_radius_does_not_depend_on_the_scale_of_the_logits():
    model, x = vmoe(), images_of(4)
    before = jacobian(model, x)
    after = jacobian(lambda x: 8 * model(x), x)
    torch.testing.assert_close(after.radius, before.radius, rtol=1e-12, atol=0)
    torch.testing.assert_close(after.spectral, 8 * before.spectral, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"ensemble_size": 2}, {"classifier": "map"}])
def test_choices_have_no_gradient(options):
    model, x = vmoe(**options), images_of(3)
    free, frozen, constant = (jacobian_matrix(model, x, routing=r) for r in ROUTINGS)
    torch.testing.assert_close(free, frozen, rtol=1e-12, atol=1e-12)
    assert (free - constant).norm() > 0.01 * free.norm()
    for routing, rows in (("frozen", free), ("gates_frozen", constant)):
        found = jacobian(model, x, routing=routing)
        torch.testing.assert_close(found.spectral, spectral(rows))
        assert found.routing == routing and found.passes.tolist() == [5] * 3


def test_a_dense_model_is_the_same_under_every_routing():
    model, x = dense(), images_of(3)
    free, *others = (jacobian_matrix(model, x, routing=routing) for routing in ROUTINGS)
    assert all(torch.equal(free, other) for other in others)


def test_in_a_network_of_one_layer_constant_gates_and_the_gates_add_up():
    model, x = LinearlyRouted(), normal(4, 5)
    whole, experts = jacobian_matrix(model, x), jacobian_matrix(model, x, routing="gates_frozen")
    point = x.clone().requires_grad_()
    with GatesOnly().around(model, {}):
        logits = model(point)
    gates = torch.stack(
        [torch.autograd.grad(z.sum(), point, retain_graph=True)[0] for z in logits.unbind(1)], 1
    )
    # both terms have the path around the layer
    around = model.head.weight @ model.stem.weight.view(model.tokens, 6, -1).mean(0)
    torch.testing.assert_close(experts + gates - around, whole, rtol=1e-12, atol=1e-12)


def test_terms_of_a_network_are_norms_of_its_jacobians():
    model, x = vmoe(), images_of(5)
    found = network_terms(model, x, batch_size=2)
    whole = jacobian_matrix(model, x)
    gates = whole - jacobian_matrix(model, x, routing="gates_frozen")
    torch.testing.assert_close(found.frobenius, whole.flatten(1).norm(dim=1))
    torch.testing.assert_close(found.spectral, spectral(whole))
    torch.testing.assert_close(found.gates_frobenius, gates.flatten(1).norm(dim=1))
    torch.testing.assert_close(found.gates_spectral, spectral(gates))
    torch.testing.assert_close(found.frobenius_share, found.gates_frobenius / found.frobenius)
    torch.testing.assert_close(found.spectral_share, found.gates_spectral / found.spectral)
    assert (network_terms(dense(), x).frobenius_share == 0).all()
    flat = vmoe()
    torch.nn.init.zeros_(flat.head.weight)
    assert (network_terms(flat, x).spectral_share == 0).all()


@pytest.mark.parametrize("steps", [2, 50])
def test_of_many_classes_lanczos_gives_the_largest_singular_value(steps):
    weight, x = normal(40, 50), normal(3, 2, 25, seed=1)

    def model(x):
        return (x.flatten(1) @ weight.T / 7).tanh()

    exact = spectral(jacobian_matrix(model, x))
    found = jacobian(model, x, tolerance=1e-8, steps=steps)
    assert not found.exact and (found.rivals >= 31).all() and (found.rivals < 39).any()
    assert (found.spectral <= exact * (1 + 1e-12)).all()
    nearest = torch.linalg.svdvals(jacobian_matrix(model, x).flatten(2)) - found.spectral[:, None]
    assert (nearest.abs().amin(1) <= found.residual + 1e-12).all()
    if steps == 50:
        torch.testing.assert_close(found.spectral, exact, rtol=1e-12, atol=0)
        assert (found.residual <= 1e-8 * exact).all()
    else:
        assert (found.residual > 1e-3 * exact).all()


@pytest.mark.parametrize("norm", NORMS)
def test_of_many_classes_the_nearest_rivals_are_looked_at(norm):
    weight, x = normal(40, 50), normal(12, 50, seed=1)
    whole = jacobian(Linear(weight), x, norm=norm, max_rows=40)
    some = jacobian(Linear(weight), x, norm=norm, max_rows=5, tolerance=1e-10)
    seen = ~some.margin_slopes.isnan()
    assert torch.equal(seen.sum(1) - 1, some.rivals) and not some.exact
    assert ((some.rivals >= 4) & (some.rivals <= 8)).all()
    largest = whole.logits.topk(5, dim=1).indices
    assert seen.gather(1, largest).all()
    torch.testing.assert_close(some.margin_slopes[seen], whole.margin_slopes[seen])
    assert (some.radius >= whole.radius * (1 - 1e-12)).all()
    torch.testing.assert_close(some.margins, whole.margins)
    torch.testing.assert_close(some.radius[some.settled], whole.radius[some.settled])
    assert whole.settled.all() and whole.rivals.tolist() == [39] * 12


def steep_and_far_behind(margin):
    """40 classes: 32 near and flat, and the last one behind by a margin, and 100 times as steep."""
    weight, bias = torch.zeros(40, 4, **wide), torch.zeros(40, **wide)
    bias[0], bias[1:33], weight[1:33, 1] = 1.0, 0.5, 0.01
    bias[39], weight[39, 0] = 1 - margin, 100.0
    return lambda x: x @ weight.T + bias


def test_a_class_far_behind_is_looked_at_or_the_radius_is_said_to_be_at_most():
    x = torch.zeros(2, 4, **wide)
    for margin, options, found in ((0.9, {}, True), (5.0, {"max_rows": 4}, False)):
        model = steep_and_far_behind(margin)
        whole = jacobian(model, x, max_rows=40)
        some = jacobian(model, x, **options)
        torch.testing.assert_close(whole.radius, torch.full((2,), margin / 100, **wide))
        assert bool((some.radius == whole.radius).all()) == found == bool(some.settled.all())
        assert ("≤" in repr(some)) != found and "≤" not in repr(whole) and whole.exact


def test_in_linf_a_slope_may_be_larger_by_the_root_of_the_pixels():
    """A near class of slope 100, of one pixel, and one far behind, of 16 equal ones."""
    weight, bias = torch.zeros(40, 16, **wide), torch.full((40,), 0.11, **wide)
    x = torch.zeros(2, 16, **wide)
    bias[0], bias[1], bias[39] = 1.0, 0.5, 0.1
    weight[1, 0], weight[39] = 100.0, 25.0
    for norm, settled, factor in (("L2", True, 1), ("Linf", False, 4)):
        found = jacobian(lambda x: x @ weight.T + bias, x, norm=norm, max_rows=4)
        assert found.settled.tolist() == [settled] * 2
        torch.testing.assert_close(found.radius, torch.full((2,), 0.5 / 100, **wide))
        whole = jacobian(lambda x: x @ weight.T + bias, x, norm=norm, max_rows=40)
        nearest = min(0.5 / 100, 0.9 / (100 * factor))
        torch.testing.assert_close(whole.radius, torch.full((2,), nearest, **wide))


def test_classes_that_cannot_be_nearer_are_left_out():
    """With a bound that holds: rows of length 1 at right angles, so ‖J‖₂ is 1."""
    rows, x = torch.eye(40, **wide), torch.zeros(2, 40, **wide)
    bias = -torch.arange(40.0, **wide)
    bias[0] = 1.0
    found = jacobian(lambda x: x @ rows + bias, x, norm="L2", max_rows=3)
    assert found.settled.all() and found.rivals.tolist() == [2, 2]
    torch.testing.assert_close(found.radius, torch.full((2,), 2 / 2**0.5, **wide))


def test_lanczos_and_rows_agree_on_a_mixture_of_experts():
    model, x = vmoe(), images_of(5)
    whole, some = jacobian(model, x), jacobian(model, x, max_rows=2, tolerance=1e-10)
    torch.testing.assert_close(some.spectral, whole.spectral, rtol=1e-10, atol=0)
    # the next class is the only rival of most images, and an upper one of all
    assert (some.radius >= whole.radius * (1 - 1e-12)).all()


def test_an_image_is_measured_by_itself():
    model, x = vmoe(), images_of(5)
    for options in ({}, {"max_rows": 2, "tolerance": 1e-3}):
        together, one_by_one = (jacobian(model, x, batch_size=b, **options) for b in (5, 1))
        for name in ("spectral", "residual", "radius", "margin_slopes"):
            torch.testing.assert_close(
                getattr(together, name), getattr(one_by_one, name), rtol=1e-9, atol=1e-9,
                equal_nan=True,
            )  # fmt: skip


def test_a_capacity_inside_an_image_is_taken_and_one_over_images_is_refused():
    inside, over = (vmoe(capacity=Capacity(1.0, images_per_group=n, multiple_of=1)) for n in (1, 2))
    x = images_of(3)
    free, frozen = (jacobian_matrix(inside, x, routing=r) for r in ("free", "frozen"))
    torch.testing.assert_close(free, frozen, rtol=1e-12, atol=1e-12)
    for measure in (jacobian, jacobian_matrix, network_terms):
        with pytest.raises(ValueError, match="images influence each other"):
            measure(over, x)


def test_radii_of_images_that_are_no_rows_of_the_book():
    x = normal(2, 3)
    zero, one = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)

    def shifted(x):  # the margin is 1 everywhere
        return torch.stack([x.sum(1) + 1, x.sum(1)], 1)

    assert jacobian(shifted, x).radius.tolist() == [float("inf")] * 2
    assert jacobian(shifted, x, one).radius.tolist() == [0, 0]
    assert jacobian(lambda x: x[:, :1].repeat(1, 2), x, zero).radius.tolist() == [0, 0]  # a tie
    single = jacobian(lambda x: x[:, :1], x)
    assert single.radius.tolist() == [float("inf")] * 2 and single.exact
    assert single.spectral.tolist() == [1, 1]


def test_an_image_that_is_wrong_has_radius_0():
    weight, x = normal(4, 6), normal(5, 6, seed=1)
    right = (x @ weight.T).argmax(1)
    wrong = (right + 1) % 4
    found = jacobian(Linear(weight), x, wrong)
    assert (found.radius == 0).all() and (found.margins.amin(1) < 0).all()
    assert torch.equal(found.labels, wrong)
    assert (jacobian(Linear(weight), x, wrong, max_rows=2).radius == 0).all()


class Attending(nn.Module):
    """A user's own attention, by torch's fused kernel."""

    def forward(self, x):
        tokens = x[:, None]
        return nn.functional.scaled_dot_product_attention(tokens, 2 * tokens, tokens).sum((1, 2))


def test_attention_of_other_libraries_is_differentiated_twice():
    x = normal(2, 5, 4)
    whole = jacobian(Attending(), x)
    found = jacobian(Attending(), x, max_rows=2, tolerance=1e-10)
    torch.testing.assert_close(found.spectral, whole.spectral)


def test_of_no_image():
    model, nothing = vmoe(), images_of(0)
    found = jacobian(model, nothing, torch.zeros(0, dtype=torch.int64))
    assert found.radius.shape == (0,) and found.logits.shape == (0, 0)
    assert "0 images" in repr(found)
    assert jacobian_matrix(model, nothing).shape == (0, 0, 1, 6, 6)
    assert network_terms(model, nothing).frobenius_share.shape == (0,)


def test_in_float32_it_is_near():
    model, x = vmoe(), images_of(3)
    exact = jacobian(model, x)
    found = jacobian(model.float(), x.float())
    assert found.spectral.dtype == torch.float64
    torch.testing.assert_close(found.spectral, exact.spectral, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.radius, exact.radius, rtol=1e-3, atol=0)


def test_further_inputs_travel_with_their_images():
    model, x = vmoe(), images_of(4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0]])
    rows = jacobian_matrix(model, x, extra={"mask": mask}, batch_size=3)
    assert (rows[3, :, :, :3, :3] == 0).all() and rows[3, :, :, :3, 3:].abs().max() > 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails):
    model, x = vmoe().train(), images_of(2)
    model.head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    if fails:
        model.head.register_forward_hook(lambda *_: torch.full((2, 3), float("nan"), **wide))
    state = torch.get_rng_state()
    for routing in ROUTINGS:
        if fails:
            with pytest.raises(ValueError, match="finite"):
                jacobian(model, x, routing=routing)
        else:
            jacobian(model, x, routing=routing, max_rows=2)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"norm": "L7"}, ValueError, "norm"),
        ({"routing": "held"}, ValueError, "routing must be one of"),
        ({"max_rows": 1}, ValueError, "max_rows must be at least 2"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be finite and above 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, TypeError, r"int64 tensor \(2,\).*\(3,\)"),
        ({"labels": torch.zeros(2)}, TypeError, "int64 tensor.*float32"),
        ({"labels": [0, 1]}, TypeError, "int64 tensor.*list"),
        ({"model": lambda x: x.flatten(1), "routing": "frozen"}, TypeError, "must be an nn.Module"),
        ({"labels": torch.tensor([0, 3])}, ValueError, "labels must be from 0 to 2, got 0 … 3"),
        ({"x": torch.zeros(2, 1, 6, 6).bfloat16()}, TypeError, "float32 or float64"),
        ({"model": lambda x: x.flatten(1).log()}, ValueError, "finite"),
        ({"model": lambda x: x.detach().flatten(1)}, ValueError, "differentiable"),
    ],
)
def test_what_is_wrong_is_named(change, error, message):
    arguments = {"model": vmoe(), "x": -images_of(2)} | change
    with pytest.raises(error, match=message):
        jacobian(arguments.pop("model"), arguments.pop("x"), **arguments)


def test_a_soft_moe_has_no_gates_to_freeze():
    model = vmoe(make_moe=lambda: SoftMoE(12, 16, 4, 2))
    assert jacobian(model, images_of(2)).spectral.isfinite().all()
    with pytest.raises(ValueError, match="Soft MoE"):
        network_terms(model, images_of(2))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner = Attending()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_activation_checkpoints_run_the_same_attention_again():
    x = normal(2, 5, 4)
    found = jacobian(Checkpointed(reentrant=False), x, max_rows=2, tolerance=1e-10)
    torch.testing.assert_close(found.spectral, jacobian(Attending(), x).spectral)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        jacobian(Checkpointed(reentrant=True), x)
