"""Slope profiles of functions whose slopes are known."""

from itertools import product

import pytest
import torch
from smoothness_models import dense, images_of, vmoe
from torch import nn

from ironmoe.attacks.smoothness import nearest_swaps, slope_profile, swap_jumps
from ironmoe.moe import Capacity, ExpertChoiceRouter, MoE

wide = {"dtype": torch.float64}
RADII = [0.4, 0.02, 0.1]


class Linear(nn.Module):
    def __init__(self, pixels=6, classes=3, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, pixels, generator=generator, **wide))

    def forward(self, x):
        return x @ self.weight.T


class Step(nn.Module):
    """Jumps by (height, 0) where the first pixel rises above 0."""

    def __init__(self, height):
        super().__init__()
        self.height = height

    def forward(self, x):
        jump = self.height * (x[:, :1] > 0).double()
        return torch.cat([jump + 0 * x[:, :1], 0 * x[:, :1]], 1)


def points(count=3, pixels=6, seed=1):
    return torch.rand(count, pixels, generator=torch.Generator().manual_seed(seed), **wide)


def operator_norm(weight, norm):
    """max ‖W d‖₂ over ‖d‖ ≤ 1."""
    if norm == "L2":
        return torch.linalg.matrix_norm(weight, 2)
    if norm == "L1":  # at a corner, a single pixel
        return weight.norm(dim=0).max()
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=weight.shape[1])), **wide)
    return (signs @ weight.T).norm(dim=1).max()


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_of_a_linear_model_the_profile_is_the_operator_norm_at_every_radius(norm):
    model, x = Linear(), points()
    bounds = (-10.0, 10.0) if norm == "L1" else None
    found = slope_profile(model, x, RADII, norm=norm, bounds=bounds, steps=20, restarts=3)
    assert found.radii.tolist() == sorted(RADII)
    expected = operator_norm(model.weight.detach(), norm).expand(3, 3)
    torch.testing.assert_close(found.profile, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.slopes, expected, rtol=1e-4, atol=0)
    assert (found.slopes <= expected * (1 + 1e-9)).all()
    assert (found.rounding < 1e-13).all()


def test_of_a_linear_margin_it_is_the_dual_norm_of_its_weights():
    model = Linear(classes=2)
    weight = model.weight.detach()
    for norm, dual in (("Linf", 1), ("L2", 2)):
        found = slope_profile(model, points(), RADII, norm=norm, out="margin", steps=12)
        expected = (weight[0] - weight[1]).norm(dual).expand(3, 3)
        torch.testing.assert_close(found.profile, expected, rtol=1e-4, atol=0)

    # Of the other label the change has the opposite sign and the same size.
    labels = torch.tensor([0, 1, 0])
    same = slope_profile(model, points(), RADII, norm="L2", out="margin", labels=labels, steps=12)
    torch.testing.assert_close(same.profile, found.profile, rtol=1e-4, atol=0)


def test_a_jump_rises_as_one_over_the_radius():
    """At the jump itself; slopes, which count smaller balls, too, do not fall with the radius."""
    model, x = Step(2.0), torch.zeros(4, 5, **wide)
    found = slope_profile(model, x, RADII, restarts=8, steps=1)
    torch.testing.assert_close(found.changes, torch.full((4, 3), 2.0, **wide))
    torch.testing.assert_close(found.profile, (2 / found.radii).expand(4, 3))
    assert (found.slopes > found.profile).all()  # of points inside the ball
    assert (found.slopes.diff(dim=1) >= 0).all()

    # 0.05 before the jump no smaller ball has it.
    x[:, 0] = -0.05
    found = slope_profile(model, x, RADII, restarts=8, steps=1)
    assert (found.changes[:, 0] == 0).all() and (found.changes[:, 1:] == 2).all()


def test_the_worst_point_is_tried_again_further_out():
    """So without a single step a linear function loses nothing from radius to radius."""
    found = slope_profile(Linear(), points(), [0.1, 0.2, 0.4, 0.8], norm="L2", steps=0)
    assert (found.profile.diff(dim=1) > -1e-12).all()


def test_every_number_is_reached_by_a_point_of_its_ball_and_not_below_a_random_one():
    """Slopes and changes do not fall with the radius, and a random point never beats them."""
    model, x = vmoe(), images_of(3)
    found = slope_profile(model, x, RADII, norm="L2", steps=6)
    assert (found.changes.diff(dim=1) >= 0).all() and (found.slopes.diff(dim=1) >= 0).all()
    assert (found.slopes >= found.profile * (1 - 1e-12)).all()
    generator = torch.Generator().manual_seed(0)
    clean = model(x)
    for _ in range(10):
        step = torch.randn(x.shape, generator=generator, **wide)
        step *= 0.1 / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        change = (model(x + step) - clean).norm(dim=1)
        assert (change <= found.changes[:, 1]).all()


def test_small_radii_find_the_norm_of_the_jacobian():
    model, x = dense(), images_of(3)
    found = slope_profile(model, x, [1e-4, 1e-5], norm="L2", steps=20)
    for image in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda at: model(at)[0], x[image : image + 1]
        ).flatten(1)
        norm = torch.linalg.matrix_norm(jacobian, 2).expand(2)
        torch.testing.assert_close(found.profile[image], norm, rtol=2e-3, atol=0)


def test_held_routing_leaves_the_jumps_out():
    """Beside a swap the free model jumps, whose slope is far above that of the held one."""
    model, x = vmoe(), images_of(3)
    radii = [1e-6]
    swaps = nearest_swaps(model, x, norm="L2", layers=[0])
    for _ in range(4):  # Newton's steps to the swap, as near as the radius
        x = x + (1 - 1e-7 / swaps.nearest).view(-1, 1, 1, 1) * swaps.steps
        swaps = nearest_swaps(model, x, norm="L2", layers=[0])
    assert (swaps.nearest < 1e-6).all()
    jumps = swap_jumps(model, x, swaps).logits

    free = slope_profile(model, x, radii, norm="L2", steps=5, restarts=3)
    held = {
        routing: slope_profile(model, x, radii, norm="L2", steps=5, routing=routing)
        for routing in ("frozen", "gates_frozen")
    }
    assert (free.changes[:, 0] > 0.5 * jumps).all() and (jumps > 1e-3).all()
    for found in held.values():
        assert (found.changes[:, 0] < 0.05 * jumps).all()
    # Gates that are constants change less.
    assert (held["gates_frozen"].profile != held["frozen"].profile).all()


def test_the_nearest_swap_of_the_library_never_beats_the_search():
    """Of every image whose swap lies within the radius: its change and its secant."""
    for options in ({"top_k": 1, "num_experts": 8}, {"classifier": "token"}):
        model, x = vmoe(**options), images_of(6)
        clean = model(x).detach()
        for norm in ("Linf", "L2"):
            swaps = nearest_swaps(model, x, norm=norm)
            radius = 1.3 * float(swaps.nearest.median())
            found = slope_profile(model, x, [radius], norm=norm, steps=1)
            torch.testing.assert_close(found.nearest_swap, swaps.nearest)
            for share in (1.0, 1.01, 1.05):
                change = (model(x + share * swaps.steps) - clean).norm(dim=1).detach()
                secant = change / (share * swaps.nearest)
                within = share * swaps.nearest <= radius
                assert within.any() and not within.all()
                assert (found.changes[:, 0] >= change * (1 - 1e-9))[within].all()
                assert (found.slopes[:, 0] >= secant * (1 - 1e-9))[within].all()


def test_without_the_swap_a_jump_is_met_by_chance():
    """So the swaps are what finds it: the same search of a callable misses it."""
    model, x = vmoe(top_k=1, num_experts=8), images_of(8)
    swaps = nearest_swaps(model, x)
    radius = 1.01 * float(swaps.nearest.median())
    with_swaps = slope_profile(model, x, [radius], swaps=swaps, steps=3)
    hidden = slope_profile(model.forward, x, [radius], steps=3)
    assert hidden.nearest_swap.isinf().all()
    assert (with_swaps.slopes[:, 0] > 1.5 * hidden.slopes[:, 0]).sum() >= 2


def test_the_secant_is_raised_too_and_not_the_change_alone():
    """Steep near the image and flat further out: the worst change is at the radius, the worst
    secant is not."""

    def bend(x):
        return (20 * x.sum(1, keepdim=True)).tanh() + 0.01 * x.sum(1, keepdim=True)

    x = torch.zeros(2, 6, **wide)
    found = slope_profile(bend, x, [1e-3, 1.0], steps=5)
    assert (found.slopes[:, 1] > 5 * found.profile[:, 1]).all()
    torch.testing.assert_close(
        found.slopes[:, 0], torch.full((2,), 120.06, **wide), rtol=1e-2, atol=0
    )


def test_a_secant_that_is_steep_near_the_image_is_found_from_a_single_radius():
    """The largest change lies in another direction, at the radius."""

    def bend(x):
        return torch.stack([(30 * x[:, 0]).tanh(), 3 * x[:, 1]], 1)

    found = slope_profile(bend, torch.zeros(3, 2, **wide), [1.0], steps=5)
    assert (found.profile < 3.2).all() and (found.slopes > 8).all() and (found.slopes < 31).all()


def test_where_swaps_cannot_be_told_it_is_said():
    layer = ExpertChoiceRouter(12, 4, 1.0, images_per_group=1, multiple_of=1)
    model = vmoe(make_moe=lambda: MoE(12, 16, 4, router=layer, activation="gelu_tanh"))
    found = slope_profile(model, images_of(2), [0.1], steps=1)
    assert found.nearest_swap.isnan().all() and repr(found).endswith("; swaps not known)")
    held = slope_profile(vmoe(), images_of(2), [0.1], routing="frozen", steps=1)
    assert held.nearest_swap.isinf().all() and "not known" not in repr(held)


def test_batches_and_the_box_change_nothing_else():
    model, x = vmoe(), images_of(4)
    whole, parts = (slope_profile(model, x, [0.1], steps=3, batch_size=size) for size in (64, 3))
    torch.testing.assert_close(whole.changes, parts.changes)
    torch.testing.assert_close(whole.slopes, parts.slopes)

    corner = torch.ones(2, 6, **wide)
    found = slope_profile(Linear(), corner, [0.5], bounds=(0.0, 1.0), steps=10, restarts=2)
    weight = Linear().weight.detach()
    inwards = torch.tensor(list(product([0.0, 1.0], repeat=6)), **wide)
    expected = (inwards @ weight.T).norm(dim=1).max()
    torch.testing.assert_close(found.slopes[:, 0], expected.expand(2), rtol=1e-6, atol=0)


def test_float32_says_how_much_rounding_makes():
    model, x = vmoe().float(), images_of(3).float()
    found = slope_profile(model, x, [1e-7, 0.1], steps=1)
    assert (found.rounding > 1e-8).all() and (found.rounding < 1e-4).all()
    assert (found.rounding < 0.01 * found.changes[:, 1]).all()


@pytest.mark.parametrize("low", ["weights", "dispatch"])
def test_low_precision_inside_the_model_shows_in_the_rounding(low):
    x = images_of(3).float()
    if low == "dispatch":
        model, exact = vmoe(dispatch_dtype=torch.bfloat16).float(), vmoe().float()
    else:
        exact = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        model = nn.Sequential(exact, nn.Linear(1, 1).bfloat16())
        model.forward = lambda x: exact(x.bfloat16().float())
    coarse, fine = (slope_profile(each, x, [1e-4], steps=2) for each in (model, exact))
    assert (coarse.rounding > 50 * fine.rounding).all()
    assert (coarse.rounding > 0.2 * coarse.changes[:, 0]).all()  # nothing to be read off there


def test_errors_name_what_is_allowed():
    model, x = vmoe(), images_of(2)
    for radii in (0.5, "0.5", torch.tensor(0.5)):
        with pytest.raises(TypeError, match="radii must be a sequence of numbers"):
            slope_profile(model, x, radii)
    good = torch.tensor([0, 1])
    for labels in (good[:1], good.int(), [0, 1], good.double()):
        with pytest.raises(TypeError, match=r"labels must be an int64 tensor \(2,\)"):
            slope_profile(model, x, [0.1], labels=labels)
    for labels in (good - 1, good + 2):
        with pytest.raises(ValueError, match="labels must be from 0 to 2, got"):
            slope_profile(model, x, [0.1], out="margin", labels=labels)
    with pytest.raises(TypeError, match='for routing other than "free", got function'):
        slope_profile(lambda x: model(x), x, [0.1], routing="frozen")
    swaps = nearest_swaps(model, x, norm="L2")
    with pytest.raises(
        ValueError, match="those of the 2 images of x in Linf, got swaps of 2 in L2"
    ):
        slope_profile(model, x, [0.1], swaps=swaps)
    with pytest.raises(TypeError, match="swaps must be what nearest_swaps returned"):
        slope_profile(model, x, [0.1], swaps=swaps.nearest)
    wrong = {
        "radii must be finite numbers above 0": {"radii": [0.1, 0.0]},
        "out must be one of": {"out": "loss"},
        "routing must be one of": {"routing": "held"},
        "restarts must be at least 1, got 0": {"restarts": 0},
        "steps must be at least 0, got -1": {"steps": -1},
        "norm must be one of": {"norm": "L7"},
        "must be finite": {"norm": "L1"},
        r"x must lie in bounds = \(0.5, 1\)": {"bounds": (0.5, 1.0)},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            slope_profile(model, x, **({"radii": [0.1]} | options))
    with pytest.raises(ValueError, match="judge each image by itself"):
        slope_profile(vmoe(capacity=Capacity(1.0)), x, [0.1])
    with pytest.raises(ValueError, match=r"model must return finite logits, .* 2 of 2 images"):
        slope_profile(lambda x: x.flatten(1) / 0, x, [0.1])
    with pytest.raises(TypeError, match=r"logits \(2, C\), got torch.float64 of shape \(2, 1, 6"):
        slope_profile(lambda x: x, x, [0.1])
    assert len(slope_profile(model, x[:0], [0.1]).changes) == 0
