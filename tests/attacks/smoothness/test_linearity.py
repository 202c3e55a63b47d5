"""Local linearity of losses whose distance from the tangent is known."""

from itertools import product

import pytest
import torch
from smoothness_models import LinearlyRouted, dense, images_of, vmoe
from torch import nn

from ironmoe.attacks.losses import cross_entropy
from ironmoe.attacks.smoothness import ROUTINGS, local_linearity, nearest_swaps

wide = {"dtype": torch.float64}


class Quadratic(nn.Module):
    """xᵀ A x / 2 as the only logit."""

    def __init__(self, values, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        turn, _ = torch.linalg.qr(
            torch.randn(len(values), len(values), generator=generator, **wide)
        )
        self.matrix = nn.Parameter(turn @ torch.diag(torch.tensor(values, **wide)) @ turn.T)

    def forward(self, x):
        return ((x @ self.matrix) * x).sum(1, keepdim=True) / 2


def first_logit(logits, labels):
    return logits[:, 0]


def points(count=3, pixels=5, seed=1):
    return torch.rand(count, pixels, generator=torch.Generator().manual_seed(seed), **wide)


NO_LABELS = torch.zeros(3, dtype=torch.int64)


def gamma_of(model, x, eps, **options):
    found = local_linearity(model, x, NO_LABELS, eps, loss=first_logit, **options)
    return found.gamma["free"]


@pytest.mark.parametrize("values", [[3.0, 1, 0.5, -1, -2], [1.0, 0.5, 0, -1, -2.5]])
def test_of_a_quadratic_it_is_half_the_squared_radius_times_the_norm(values):
    eps, x = 0.3, points()
    found = gamma_of(Quadratic(values), x, eps, norm="L2", steps=40, restarts=2)
    expected = eps**2 * max(map(abs, values)) / 2
    torch.testing.assert_close(found, torch.full((3,), expected, **wide), rtol=1e-4, atol=0)


def test_of_a_convex_quadratic_in_linf_it_is_that_of_the_worst_corner():
    model = Quadratic([3.0, 2, 1, 0.5, 0.2])
    corners = 0.2 * torch.tensor(list(product([-1.0, 1.0], repeat=5)), **wide)
    expected = model(corners).max().detach().expand(3)
    found = gamma_of(model, points(), 0.2, steps=8, restarts=6)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_of_a_linear_loss_it_is_nothing():
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    found = local_linearity(model, points(), NO_LABELS, 0.5, loss=first_logit)
    assert (found.gamma["free"] < 1e-14).all()
    constant = local_linearity(model, points(), NO_LABELS, 0.5, loss=lambda z, _: 0 * z[:, 0])
    assert constant.routing_share.tolist() == [0, 0, 0] and not constant.gamma["free"].any()
    curved = local_linearity(model, points(), NO_LABELS, 0.5)  # cross-entropy is not linear
    assert (curved.gamma["free"] > 1e-3).all() and (curved.rounding < 1e-14).all()


def test_the_values_belong_to_points_of_the_ball():
    """Random points are no worse, and the second-order term is right for small radii."""
    model, x, labels = dense(), images_of(3), torch.tensor([0, 1, 2])
    found = local_linearity(model, x, labels, 0.05, norm="L2", steps=10)
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(model(leaf), labels)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        step = torch.randn(x.shape, generator=generator, **wide)
        step *= 0.05 / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        departure = cross_entropy(model(x + step), labels) - loss - (slope * step).sum((1, 2, 3))
        assert (departure.abs() <= found.gamma["free"]).all()

    smaller = local_linearity(model, x, labels, 0.005, norm="L2", steps=10)
    ratio = found.gamma["free"] / smaller.gamma["free"]
    assert ((ratio > 60) & (ratio < 160)).all()  # about 10²


def test_where_nothing_but_routing_is_curved_its_share_is_all():
    """Experts that are constants under gates of 1: frozen, the loss is linear."""
    with pytest.warns(UserWarning, match="give every token the same gate"):
        model = LinearlyRouted(top_k=1, renormalize=True)
    with torch.no_grad():
        model.moe.fc1.weight.zero_()
        model.moe.fc1.bias.zero_()
        model.moe.fc2.bias.normal_(generator=torch.Generator().manual_seed(0))
    found = local_linearity(model, points(), NO_LABELS, 1.0, loss=first_logit, restarts=8, steps=1)
    assert (found.gamma["frozen"] < 1e-13).all() and (found.gamma["free"] > 0.01).all()
    torch.testing.assert_close(found.routing_share, torch.ones(3, **wide))


def test_without_a_choice_the_share_is_nothing():
    x, labels = images_of(3), torch.tensor([0, 1, 2])
    model = dense()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    found = local_linearity(model, x, labels, 0.1, steps=1, restarts=3, routings=ROUTINGS)
    assert tuple(found.gamma) == ROUTINGS and found.routing_share.tolist() == [0, 0, 0]
    # a look in two sizes of batches and one at the labels; one search: the tangent, three attempts
    # of two points, and two looks at rounding
    assert len(passes) == 3 + 1 + 1 + 3 * 2 + 2
    every = local_linearity(vmoe(top_k=4), x, labels, 0.1, steps=1, restarts=1)
    torch.testing.assert_close(every.routing_share, torch.zeros(3, **wide), atol=1e-9, rtol=0)
    assert (every.gamma["free"] > 0).all()


def test_each_routing_goes_on_from_the_worst_point_of_the_other():
    model, x, labels = vmoe(), images_of(6), torch.arange(6) % 3
    options = {"steps": 2, "restarts": 1, "norm": "L2"}
    both = local_linearity(model, x, labels, 0.2, **options)
    for routing in ("free", "frozen"):
        alone = local_linearity(model, x, labels, 0.2, routings=(routing,), **options)
        assert (both.gamma[routing] >= alone.gamma[routing]).all()
        assert (both.gamma[routing] > alone.gamma[routing]).any()
    share = 1 - both.gamma["frozen"] / both.gamma["free"]
    torch.testing.assert_close(both.routing_share, share)
    with pytest.raises(ValueError, match=r"must hold .* for a share, got \('frozen',\)"):
        alone.routing_share  # noqa: B018


def test_constant_gates_have_a_tangent_of_their_own():
    """It is that of the model as it is held, so small radii leave its second order."""
    model, x, labels = vmoe(), images_of(3), torch.tensor([0, 1, 2])
    found = [
        local_linearity(model, x, labels, eps, norm="L2", steps=5, routings=("gates_frozen",))
        for eps in (1e-3, 1e-4)
    ]
    ratio = found[0].gamma["gates_frozen"] / found[1].gamma["gates_frozen"]
    assert ((ratio > 70) & (ratio < 140)).all()


def test_batches_change_nothing_and_errors_name_what_is_allowed():
    model, x, labels = vmoe().train(), images_of(5), torch.arange(5) % 3
    whole, parts = (
        local_linearity(model, x, labels, 0.1, steps=2, restarts=1, batch_size=size)
        for size in (64, 2)
    )
    for routing, gamma in whole.gamma.items():
        torch.testing.assert_close(gamma, parts.gamma[routing])
    assert all(module.training for module in model.modules())

    wrong = {
        "eps must be a finite number above 0, got 0": {"eps": 0},
        "routings must be one of": {"routings": ("free", "held")},
        "labels must be from 0 to 2, got 1 … 3": {"labels": labels + 1},
        "routings must be a sequence": {"routings": "free"},
        "loss must be one of": {"loss": "mse"},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            local_linearity(model, x, **({"labels": labels, "eps": 0.1} | options))
    for other in (labels[:2], labels.int(), labels.tolist()):
        with pytest.raises(TypeError, match=r"labels must be an int64 tensor \(5,\)"):
            local_linearity(model, x, other, 0.1)
    with pytest.raises(TypeError, match=r"one entry for each of 5 images, got .*list"):
        local_linearity(model, x, [0] * 5, 0.1, loss=first_logit)


def test_a_callable_is_searched_with_free_routing_alone():
    model, x, labels = vmoe(), images_of(3), torch.tensor([0, 1, 2])
    with pytest.raises(TypeError, match=r'nn.Module.* for routings other than "free", got method'):
        local_linearity(model.forward, x, labels, 0.1)
    options = {"routings": ("free",), "steps": 1, "restarts": 1}
    hidden = local_linearity(model.forward, x, labels, 0.1, **options)
    assert hidden.nearest_swap.isinf().all()
    # The search from the swaps is what the module has beyond it.
    found = local_linearity(model, x, labels, 0.1, **options)
    assert (found.gamma["free"] >= hidden.gamma["free"]).all()


def test_a_search_begins_beyond_the_nearest_swap():
    model, x, labels = vmoe(top_k=1, num_experts=8), images_of(6), torch.arange(6) % 3
    swaps = nearest_swaps(model, x)
    eps = 1.3 * float(swaps.nearest.median())
    found = local_linearity(
        model, x, labels, eps, steps=0, restarts=1, swaps=swaps, routings=("free",)
    )
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(model(leaf), labels)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    for share in (1.01, 1.05):
        step = share * swaps.steps
        departure = cross_entropy(model(x + step), labels) - loss - (slope * step).sum((1, 2, 3))
        within = share * swaps.nearest <= eps
        assert within.any()
        assert (found.gamma["free"] >= departure.abs() * (1 - 1e-9))[within].all()
