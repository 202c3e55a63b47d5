"""The L1 ball inside the image box, against bisection and closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ironmoe.attacks import PGD
from ironmoe.attacks.balls.ball import NORMS
from ironmoe.attacks.balls.l1 import L1Ball, l1_ascent, l1_projection
from ironmoe.attacks.random import example_keys

BOX = (0.0, 1.0)
INFINITY = float("inf")


def bisected(point, center, eps, bounds=BOX):
    """clamp(|y| − λ, 0, room) with λ from 60 halvings, in float64."""
    y, x = point.double() - center.double(), center.double()
    room = torch.where(y > 0, bounds[1] - x, x - bounds[0])

    def length(multiplier):
        return (y.abs() - multiplier).clamp_min(0).minimum(room)

    low = torch.zeros(len(x), 1, dtype=torch.float64)
    high = torch.where(
        length(low).sum(1, keepdim=True) <= eps[:, None], 0.0, y.abs().amax(1, keepdim=True)
    )
    for _ in range(60):
        middle = (low + high) / 2
        outside = length(middle).sum(1, keepdim=True) > eps[:, None]
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return x + y.sign() * length(high)


def knapsack(weight, x, length, bounds=BOX):
    """max w·d with ‖d‖₁ ≤ length and x + d in the box: the largest |w| first, as far as there is
    room. float64 (B,), (B, d)."""
    weight, x = weight.double().expand_as(x), x.double()
    room = torch.where(weight > 0, bounds[1] - x, x - bounds[0])
    order = weight.abs().argsort(1, descending=True)
    sorted_room = room.gather(1, order)
    taken = (
        (length[:, None] - sorted_room.cumsum(1) + sorted_room).clamp_min(0).minimum(sorted_room)
    )
    delta = torch.zeros_like(x).scatter(1, order, taken) * weight.sign()
    return (weight * delta).sum(1), delta


@st.composite
def cases(draw):
    """(center, eps, point): faces of the box, ties, points far out, radii of every size."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    batch, dim = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    center = torch.rand(batch, dim, dtype=dtype)
    center = torch.where(
        torch.rand(batch, dim) < draw(st.sampled_from([0.0, 0.5, 1.0])), center.round(), center
    )
    noise = torch.randn(batch, dim, dtype=dtype)
    point = center + draw(st.sampled_from([1e-3, 0.1, 1.0, 30.0])) * (
        noise.sign() if draw(st.booleans()) else noise
    )
    eps = draw(st.sampled_from([0.0, 1e-4, 0.5, 3.0, 100.0])) * torch.rand(
        batch, dtype=torch.float64
    )
    return center, eps, point


@settings(deadline=None, max_examples=60)
@given(cases())
def test_projection_is_that_of_bisection(case):
    center, eps, point = case
    projected = l1_projection(point, center, eps, BOX)
    slack = 1e-6 if center.dtype == torch.float32 else 1e-11
    torch.testing.assert_close(projected.double(), bisected(point, center, eps), rtol=0, atol=slack)


@settings(deadline=None)
@given(cases())
def test_projection_never_leaves_the_ball_and_keeps_what_is_inside(case):
    center, eps, point = case
    ball = L1Ball(center, eps, BOX)
    projected = ball.project(point)
    assert (ball.distance(projected) <= eps).all()  # in float64, for float32 images too
    assert projected.min() >= 0 and projected.max() <= 1 and projected.dtype == center.dtype
    assert torch.equal(ball.project(projected), projected)
    assert torch.equal(ball.tighten(projected), projected)
    assert (ball.distance(ball.tighten(point.clamp(*BOX))) <= eps).all()


@settings(deadline=None)
@given(cases(), st.integers(0, 99))
def test_projection_is_non_expansive(case, seed):
    center, eps, point = (t.double() for t in case)
    torch.manual_seed(seed)
    other = point + torch.randn_like(point) * torch.rand(1).pow(4)
    moved = l1_projection(point, center, eps, BOX) - l1_projection(other, center, eps, BOX)
    assert (moved.norm(dim=1) <= (point - other).norm(dim=1) + 1e-9).all()


def test_projection_by_hand():
    """(3, 1, −0.5) onto the ball of radius 2: λ = 1. With the first pixel's room only 1.2 it clips,
    and λ = 0.35."""
    point, eps = torch.tensor([[3.0, 1.0, -0.5]]), torch.tensor([2.0])
    zero = torch.zeros(1, 3)
    torch.testing.assert_close(
        l1_projection(point, zero, eps, (-9, 9)), torch.tensor([[2.0, 0.0, 0.0]])
    )
    torch.testing.assert_close(
        l1_projection(point, zero, eps, (-1.2, 1.2)), torch.tensor([[1.2, 0.65, -0.15]])
    )


def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(0)
    center, eps = (
        torch.rand(6, 50),
        torch.tensor([0.0, 0.1, 1.0, 3.0, 9.0, float("inf")], dtype=torch.float64),
    )
    point, grad = center + torch.randn(6, 50), torch.randn(6, 50)
    together, steps = (
        l1_projection(point, center, eps, BOX),
        L1Ball(center, eps, BOX).step(center, grad, 0.3 * torch.ones(6)),
    )
    for i in range(6):
        one = slice(i, i + 1)
        assert torch.equal(l1_projection(point[one], center[one], eps[one], BOX), together[one])
        assert torch.equal(
            L1Ball(center[one], eps[one], BOX).step(center[one], grad[one], torch.tensor([0.3])),
            steps[one],
        )


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_an_infinite_radius_leaves_the_box(norm):
    torch.manual_seed(0)
    center = torch.rand(3, 2, 4, 4).round()
    ball = NORMS[norm](center, torch.full((3,), float("inf"), dtype=torch.float64), BOX)
    point = center + 3 * torch.randn_like(center)
    for start in (point, center):
        assert torch.equal(ball.project(start), start.clamp(0, 1))
    inside = ball.random_point(example_keys(0, torch.arange(3), 0))
    assert inside.min() >= 0 and inside.max() <= 1 and (inside - center).abs().max() > 0
    assert torch.equal(ball.tighten(inside), inside)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0, 100.0])
def test_ascent_is_the_best_step_in_the_box(alpha):
    torch.manual_seed(1)
    point, weight, length = (
        torch.rand(5, 30),
        torch.randn(5, 30),
        torch.full((5,), alpha, dtype=torch.float64),
    )
    moved = l1_ascent(point, weight, length, BOX).clamp(*BOX).double() - point.double()
    gain, delta = knapsack(weight, point, length)
    torch.testing.assert_close((weight.double() * moved).sum(1), gain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.abs().sum(1), delta.abs().sum(1), rtol=1e-5, atol=1e-5)


def test_ascent_leaves_an_optimum_and_a_zero_gradient_alone():
    torch.manual_seed(2)
    center, weight, eps = (
        torch.rand(5, 30),
        torch.randn(5, 30),
        torch.full((5,), 3.0, dtype=torch.float64),
    )
    ball = L1Ball(center, eps, BOX)
    best = ball.tighten((center.double() + knapsack(weight, center, eps)[1]).float())
    torch.testing.assert_close(ball.step(best, weight, 0.4 * eps), best, rtol=0, atol=1e-5)
    assert torch.equal(ball.step(best, torch.zeros_like(weight), eps), best)


def test_ascent_and_projection_without_a_box():
    torch.manual_seed(0)
    x = torch.rand(3, 8, dtype=torch.float64)
    grad = torch.randn_like(x)
    grad[:, :2] = 0
    alpha = torch.tensor([0.1, 1.0, 40.0], dtype=torch.float64)

    moved = l1_ascent(x, grad, alpha, (-INFINITY, INFINITY))
    largest = torch.zeros_like(x).scatter_(1, grad.abs().argmax(1, keepdim=True), 1.0)
    assert moved.allclose(x + alpha[:, None] * grad.sign() * largest)

    eps = alpha / 2
    nearest = l1_projection(moved, x, eps, (-INFINITY, INFINITY))
    assert nearest.allclose(x + eps[:, None] * grad.sign() * largest, rtol=1e-6)


def test_random_points_fill_the_ball():
    dim, n = 4, 20_000
    center, eps = torch.zeros(n, dim), torch.full((n,), 2.0, dtype=torch.float64)
    points = L1Ball(center, eps, (-9, 9)).random_point(example_keys(0, torch.arange(n), 0))
    share = points.abs().sum(1) / 2
    assert share.max() <= 1
    # r^d is uniform
    torch.testing.assert_close((share**dim).mean(), torch.tensor(0.5), rtol=0, atol=0.01)
    torch.testing.assert_close(
        points.abs().mean(0), torch.full((dim,), 2 / (dim + 1)), rtol=0, atol=0.01
    )
    torch.testing.assert_close(points.mean(0), torch.zeros(dim), rtol=0, atol=0.02)
    # 2eps² / (d+1)(d+2)
    torch.testing.assert_close(
        points.square().mean(0), torch.full((dim,), 8 / 30), rtol=0, atol=0.01
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_reaches_the_optimum_of_a_linear_model(dtype, random_start):
    torch.manual_seed(0)
    weight, x = torch.randn(48, dtype=dtype), torch.rand(16, 3, 4, 4, dtype=dtype)
    bias = (x.flatten(1) @ weight).median()

    def model(images):
        score = images.flatten(1) @ weight - bias
        return torch.stack([-score, score], 1)

    labels = model(x).argmax(1)
    result = PGD(model, 2.0, steps=20, norm="L1", random_start=random_start, early_stop=False).run(
        x, labels
    )
    sign = torch.where(labels == 1, -1.0, 1.0).double()[:, None]
    best, _ = knapsack(sign * weight, x.flatten(1), torch.full((16,), 2.0, dtype=torch.float64))
    moved = (result.adversarial.double() - x.double()).flatten(1)
    ratio = (sign * weight * moved).sum(1) / best
    assert ratio.min() >= 1 - 1e-4 and ratio.max() <= 1 + 1e-6
    torch.testing.assert_close(result.distance, moved.abs().sum(1), rtol=1e-12, atol=0)
    assert (result.distance <= 2).all() and bool(result.success.any())
