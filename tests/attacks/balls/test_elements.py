"""Balls and boxes that differ from element to element: a mask, a radius a feature, a box a channel.

The oracles are bisections of one multiplier, and points of the same ball drawn at random.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ironmoe.attacks.balls.ball import NORMS, ball_of
from ironmoe.attacks.balls.elements import region_of
from ironmoe.attacks.random import example_keys

every_norm = pytest.mark.parametrize("norm", NORMS)


def ball(norm, center, eps, low, high, scale):
    return ball_of(norm).scaled()(center, eps, (low, high), scale)


def length(norm, units):
    order = {"Linf": math.inf, "L2": 2, "L1": 1}[norm]
    return torch.linalg.vector_norm(units.flatten(1), order, 1)


def over(change, scale):
    """change / scale in float64; 0 for frozen elements."""
    return torch.where(scale > 0, change.double() / scale, 0)


@st.composite
def cases(draw):
    """(center, eps, low, high, scale, point): masks, radii of several sizes, pixels at their faces
    and faces that meet."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    batch, dim = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    shape = (batch, dim)

    low = -torch.rand(shape, dtype=torch.float64).to(dtype)
    high = torch.rand(shape, dtype=torch.float64).to(dtype)
    at = torch.rand(shape).to(dtype)
    at = torch.where(torch.rand(shape) < 0.3, at.round(), at)
    center = (low + at * (high - low)).clamp(low, high)

    scale = draw(st.sampled_from([1.0, 3.0])) * torch.rand(shape, dtype=torch.float64)
    scale = 10 ** (-draw(st.sampled_from([0.0, 1.0, 4.0])) * scale)
    if draw(st.booleans()):
        scale = torch.ones_like(scale)
    frozen = torch.rand(shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    scale = scale.masked_fill(frozen, 0)

    eps = draw(st.sampled_from([0.0, 1e-4, 0.05, 0.5, 3.0, math.inf]))
    eps = eps * (0.1 + torch.rand(batch, dtype=torch.float64))
    size = draw(st.sampled_from([1e-3, 0.1, 1.0, 30.0]))
    point = center + size * torch.randn(shape).to(dtype)
    return center, eps, low, high, scale, point


def bisected(norm, center, eps, low, high, scale, point):
    """Each element by one multiplier λ ≥ 0, by halving: sign(y) clamp(|y| − λ / scale, 0,
    room) in L1, clamp(y / (1 + λ / scale²)) in L2."""
    x, y = center.double(), point.double() - center.double()
    room = torch.where(y > 0, high.double() - x, x - low.double())
    room, size = torch.where(scale > 0, room, 0), y.abs()
    safe = torch.where(scale > 0, scale, 1)
    if norm == "Linf":
        eps_each = torch.where(scale > 0, eps[:, None] * safe, 0)
        return x + y.sign() * size.minimum(room).minimum(eps_each)

    def at(multiplier):
        shrunk = size - multiplier / safe if norm == "L1" else size / (1 + multiplier / safe**2)
        return shrunk.clamp_min(0).minimum(room)

    def beyond(multiplier):
        return (length(norm, over(at(multiplier), scale)) > eps)[:, None]

    low_end = torch.zeros(len(x), 1, dtype=torch.float64)
    high_end = torch.where(beyond(low_end), 1e4, 0.0).double()
    high_end = torch.where(eps[:, None] == 0, 1e30, high_end)
    for _ in range(60):
        if not beyond(high_end).any():
            break
        high_end = torch.where(beyond(high_end), high_end * 10, high_end)
    for _ in range(400):
        middle = torch.where(
            (low_end > 0) & (high_end > 4 * low_end),
            (low_end * high_end).sqrt(),
            (low_end + high_end) / 2,
        )
        if ((middle == low_end) | (middle == high_end)).all():
            break  # no number lies between
        low_end = torch.where(beyond(middle), middle, low_end)
        high_end = torch.where(beyond(middle), high_end, middle)
    return x + y.sign() * at(high_end)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(sorted(NORMS)), cases())
def test_the_projection_is_that_of_bisection(norm, case):
    center, eps, low, high, scale, point = case
    projected = ball(norm, center, eps, low, high, scale).project(point)
    expected = bisected(norm, center, eps, low, high, scale, point)
    slack = 3e-7 if center.dtype == torch.float32 else 1e-9
    torch.testing.assert_close(projected.double(), expected, rtol=0, atol=slack)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(sorted(NORMS)), cases())
def test_projections_are_feasible_and_idempotent(norm, case):
    center, eps, low, high, scale, point = case
    where = ball(norm, center, eps, low, high, scale)
    for project in (where.project, where.pull_in, lambda at: where.tighten(where.project(at))):
        projected = project(point)
        change = projected.double() - center.double()
        assert (where.distance(projected) <= eps).all()
        assert (length(norm, over(change, scale)) <= eps * (1 + 1e-12)).all()
        assert (projected >= low).all() and (projected <= high).all()
        assert torch.equal(projected[scale == 0], center[scale == 0])
        assert torch.equal(project(projected), projected)


@settings(deadline=None)
@given(st.sampled_from(sorted(NORMS)), cases(), st.integers(0, 99))
def test_projections_are_nearest_in_their_metric(norm, case, seed):
    center, eps, low, high, scale, point = case
    center, low, high, point = (each.double() for each in (center, low, high, point))
    where = ball(norm, center, eps, low, high, scale)
    keys = example_keys(seed, torch.arange(len(center)), 0)
    other = where.random_point(keys)
    assert (where.distance(other) <= eps).all()

    def apart(projected, scale):
        return over(projected - point, scale).norm(dim=1)

    ones = (scale > 0).double()
    near, far = apart(where.project(point), ones), apart(other, ones)
    assert (near <= far * (1 + 1e-9) + 1e-9).all()
    near, far = apart(where.pull_in(point), scale), apart(other, scale)
    assert (near <= far * (1 + 1e-9) + 1e-9).all()


def test_linf_moves_each_element_by_its_eps_and_not_more():
    """In float64, although the images are float32 and the ball divides by the largest eps."""
    torch.manual_seed(0)
    center = torch.rand(40, 3, 8, 8)
    for eps in (torch.rand(3, 1, 1) * 0.1, torch.rand(3, 8, 8) * 0.1, torch.rand(40, 1, 8, 1) / 9):
        region = region_of(eps, (0.0, 1.0), center.shape)
        radius = region.radius.expand(40)
        where = ball("Linf", center, radius, region.low, region.high, region.scale)
        for corner in (center + 1, center - 1):
            moved = where.project(corner)
            change = (moved.double() - center.double()).abs()
            assert (change <= eps.double()).all()
            assert (where.distance(moved) <= radius).all()
            free = (moved > 0) & (moved < 1)
            short = (eps.double().expand_as(change) - change)[free]
            assert short.max() < 2e-7


@every_norm
def test_a_step_is_the_steepest_of_its_length(norm):
    """No random step of the same length raises a linear function more, and where the box is far
    away the gain is the length times the dual norm."""
    torch.manual_seed(1)
    center = torch.zeros(6, 12, dtype=torch.float64)
    scale = torch.rand(6, 12, dtype=torch.float64)
    scale[:, ::3] = 0
    alpha = torch.full((6,), 0.3, dtype=torch.float64)
    where = ball(norm, center, 10 * alpha, torch.tensor(-9.0), torch.tensor(9.0), scale)
    for size in (1e-30, 1.0, 1e30):
        weight = size * torch.randn(6, 12, dtype=torch.float64)
        step = where.ascend(center, weight, alpha) - center
        torch.testing.assert_close(where.measure(step), alpha)
        gain = (weight * step).sum(1)
        torch.testing.assert_close(gain, alpha * where.slope(weight))
        for draw in range(20):
            other = where.random_step(example_keys(draw, torch.arange(6), 0))
            other = other * (alpha / where.measure(other))[:, None]
            assert ((weight * other).sum(1) <= gain * (1 + 1e-12)).all()
            assert not other[scale == 0].any()
    assert torch.equal(where.ascend(center, torch.zeros_like(center), alpha), center)


@every_norm
def test_steps_of_any_length_end_at_the_optimum_of_a_linear_function(norm):
    """From the center and from random points; it is where the step onto the hyperplane through it
    ends, too."""
    torch.manual_seed(2)
    count, dim = 8, 20
    center = torch.rand(count, dim, dtype=torch.float64)
    scale = torch.rand(count, dim, dtype=torch.float64) ** 2
    scale[torch.rand(count, dim) < 0.3] = 0
    low, high = torch.full((dim,), -0.2), torch.linspace(1, 2, dim)
    eps = torch.full((count,), {"Linf": 0.5, "L2": 1.0, "L1": 2.0}[norm], dtype=torch.float64)
    where = ball(norm, center, eps, low, high, scale)
    weight = torch.randn(count, dim, dtype=torch.float64)

    starts = (center, where.random_point(example_keys(0, torch.arange(count), 0)))
    found = []
    for point in starts:
        for step in range(300):
            point = where.step(point, weight, eps * max(0.5 * 0.95**step, 1e-3))
        assert (where.distance(point) <= eps).all()
        found.append((weight * (point - center)).sum(1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)

    # The shortest step that gains as much is as long as the radius, or ends in a corner.
    onto = where.step_onto(center, weight, -found[0] * (1 - 1e-9))
    assert (where.measure(onto) <= eps * (1 + 1e-9)).all()
    further = where.step_onto(center, weight, -found[0] * 1.01)
    in_corner = (further - onto).abs().sum(1) < 0.01
    assert ((where.measure(further) > eps * 0.999) | in_corner).all()


def knapsack(weight, room, scale, budget):
    """max Σ weight · d with 0 ≤ d ≤ room and Σ d / scale ≤ budget, weight ≥ 0: the element with the
    largest weight · scale first."""
    gain = torch.zeros(len(weight), dtype=torch.float64)
    for row in range(len(weight)):
        left = float(budget[row])
        for one in (weight * scale)[row].argsort(descending=True).tolist():
            if scale[row, one] > 0 and left > 0:
                taken = min(float(room[row, one]), left * float(scale[row, one]))
                left -= taken / float(scale[row, one])
                gain[row] += float(weight[row, one]) * taken
    return gain


def test_l1_steps_reach_the_fractional_knapsack():
    torch.manual_seed(3)
    center = torch.rand(8, 20, dtype=torch.float64)
    scale = torch.rand(8, 20, dtype=torch.float64)
    scale[torch.rand(8, 20) < 0.4] = 0
    eps = torch.full((8,), 1.5, dtype=torch.float64)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    where = ball("L1", center, eps, zero, one, scale)
    weight = torch.randn(8, 20, dtype=torch.float64)
    room = torch.where(weight > 0, 1 - center, center)
    best = knapsack(weight.abs(), room, scale, eps)

    point = where.random_point(example_keys(0, torch.arange(8), 0))
    for _ in range(400):
        point = where.step(point, weight, 0.1 * eps)
    torch.testing.assert_close((weight * (point - center)).sum(1), best, rtol=1e-6, atol=0)


@every_norm
def test_the_step_onto_a_hyperplane_is_the_shortest(norm):
    torch.manual_seed(4)
    count, dim = 30, 12
    point = torch.rand(count, dim, dtype=torch.float64)
    scale = torch.rand(count, dim, dtype=torch.float64)
    scale[torch.rand(count, dim) < 0.3] = 0
    low = torch.full((dim,), -0.1, dtype=torch.float64)
    high = torch.linspace(1, 1.5, dim, dtype=torch.float64)
    eps = torch.ones(count, dtype=torch.float64)
    where = ball(norm, point, eps, low, high, scale)
    weight = torch.randn(count, dim, dtype=torch.float64)
    weight[:, 0] = 0
    room = torch.where(weight > 0, high - point, point - low)
    reach = (weight.abs() * room * (scale > 0)).sum(1)
    value = -reach * torch.rand(count, dtype=torch.float64)

    step = where.step_onto(point, weight, value)
    left = value + (weight * step).sum(1)
    assert left.abs().max() < 1e-12
    assert not step[scale == 0].any() and not step[:, 0].any()
    assert (point + step <= high + 1e-12).all() and (point + step >= low - 1e-12).all()

    # A ball a little smaller does not reach the hyperplane.
    smaller = where.measure(step) * (1 - 1e-6)
    inner = ball(norm, point, smaller, low, high, scale)
    at = point
    for _ in range(400):
        at = inner.step(at, weight, 0.5 * smaller)
    assert (value + (weight * (at - point)).sum(1) < 0).all()


@every_norm
def test_where_all_is_frozen_nothing_moves(norm):
    torch.manual_seed(5)
    center = torch.rand(3, 2, 4)
    nothing = torch.zeros(2, 4, dtype=torch.float64)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    for eps in (0.0, 0.5, math.inf):
        radius = torch.full((3,), eps, dtype=torch.float64)
        where = ball(norm, center, radius, zero, one, nothing)
        keys = example_keys(0, torch.arange(3), 0)
        grad = torch.randn_like(center)
        alpha = torch.ones(3, dtype=torch.float64)
        for moved in (
            where.project(center + 1), where.pull_in(center + 1), where.tighten(center),
            where.step(center, grad, alpha), where.random_point(keys),
            where.clip(center + 1), center + where.step_onto(center, grad, alpha),
        ):  # fmt: skip
            assert torch.equal(moved, center)
        assert torch.equal(where.distance(center), torch.zeros(3, dtype=torch.float64))
        assert where.distance(center + 0.1).isinf().all()


@every_norm
def test_random_points_fill_the_elements_that_move(norm):
    count = 20_000
    center = torch.zeros(count, 4)
    eps = torch.full((count,), 2.0, dtype=torch.float64)
    scale = torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    where = ball(norm, center, eps, torch.tensor(-9.0), torch.tensor(9.0), scale)
    points = where.random_point(example_keys(0, torch.arange(count), 0))
    assert not points[:, 3].any()

    # The share of the radius, to the power of the three dimensions, is uniform.
    share = where.distance(points) / 2
    assert share.max() <= 1
    torch.testing.assert_close((share**3).mean().item(), 0.5, rtol=0, atol=0.01)
    spread = points[:, :3].double().abs().mean(0) / scale[:3]
    torch.testing.assert_close(spread, spread.mean().expand(3), rtol=0.03, atol=0)


@every_norm
def test_a_row_does_not_depend_on_the_others(norm):
    torch.manual_seed(6)
    center, grad = torch.rand(6, 30), torch.randn(6, 30)
    scale = torch.rand(6, 30, dtype=torch.float64)
    eps = torch.tensor([0.0, 0.1, 1.0, 3.0, 9.0, 0.5], dtype=torch.float64)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    whole = ball(norm, center, eps, zero, one, scale)
    point = center + torch.randn(6, 30)
    alpha = 0.3 * eps
    for row in range(6):
        part = slice(row, row + 1)
        alone = whole[part]
        assert torch.equal(alone.project(point[part]), whole.project(point)[part])
        assert torch.equal(
            alone.step(center[part], grad[part], alpha[part]),
            whole.step(center, grad, alpha)[part],
        )


@every_norm
def test_a_scale_of_one_is_the_plain_ball(norm):
    torch.manual_seed(7)
    center = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    eps = torch.tensor([0.0, 0.05, 0.3, 1.0, 50.0], dtype=torch.float64)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    scaled = ball(norm, center, eps, zero, one, None)
    plain = ball_of(norm)(center, eps, (0.0, 1.0))
    point, grad = center + torch.randn_like(center), torch.randn_like(center)
    keys = example_keys(0, torch.arange(5), 0)
    value = torch.randn(5, dtype=torch.float64)
    for name, arguments in {
        "project": (point,), "pull_in": (point,), "ascend": (center, grad, eps),
        "step": (center, grad, 0.3 * eps), "random_point": (keys,), "distance": (point,),
        "measure": (grad,), "slope": (grad,), "step_onto": (center, grad, value),
        "random_step": (keys,), "clip": (point,), "tighten": (point.clamp(0, 1),),
    }.items():  # fmt: skip
        torch.testing.assert_close(
            getattr(scaled, name)(*arguments),
            getattr(plain, name)(*arguments),
            rtol=1e-9,
            atol=1e-9,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@every_norm
def test_nothing_waits_for_the_device(norm):
    with FakeTensorMode():
        center = torch.rand(2, 5)
        eps = torch.rand(2, dtype=torch.float64)
        scale = torch.rand(5, dtype=torch.float64)
        where = ball(norm, center, eps, torch.rand(5), torch.rand(5), scale)
        keys = torch.arange(2)
        assert where.ascend(center, center, eps).shape == (2, 5)
        assert where.step_onto(center, center, torch.rand(2)).shape == (2, 5)
        assert where.random_point(keys).shape == where.random_step(keys).shape == (2, 5)
        assert where.distance(center).shape == where.measure(center).shape == (2,)
        if norm != "L2":  # its projection looks whether it is done
            assert where.step(center, center, eps).shape == (2, 5)
