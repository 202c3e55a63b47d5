import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ironmoe.attacks.balls.ball import NORMS
from ironmoe.attacks.balls.l2 import L2Ball
from ironmoe.attacks.balls.linf import LinfBall
from ironmoe.attacks.random import example_keys, normal, uniform

BOX = (0.0, 1.0)


@st.composite
def cases(draw):
    """(center, eps, point), float64 and float32, points far out and radii of every size."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    batch, dim = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    center = torch.rand(batch, dim, dtype=dtype)
    # many on the box's faces
    center = torch.where(torch.rand(batch, dim) < 0.3, center.round(), center)
    point = center + draw(st.sampled_from([1e-3, 0.1, 1.0, 30.0])) * torch.randn(
        batch, dim, dtype=dtype
    )
    eps = draw(st.sampled_from([0.0, 1e-4, 8 / 255, 0.5, 3.0, 100.0])) * torch.rand(
        batch, dtype=torch.float64
    )
    return center, eps, point


@given(st.sampled_from(sorted(NORMS)), cases())
def test_projection_is_feasible_idempotent_and_keeps_feasible_points(norm, case):
    center, eps, point = case
    ball = NORMS[norm](center, eps, BOX)
    projected = ball.project(point)
    slack = 1e-5 if center.dtype == torch.float32 else 1e-9
    assert (ball.distance(projected) <= eps + slack).all()
    assert projected.min() >= 0 and projected.max() <= 1
    torch.testing.assert_close(ball.project(projected), projected, rtol=0, atol=slack)
    tight = ball.tighten(projected)
    assert (ball.distance(tight) <= eps).all()
    torch.testing.assert_close(tight, projected, rtol=0, atol=slack + 1e-6)


@given(cases())
def test_l2_projection_satisfies_kkt(case):
    """z = clamp((y + λx) / (1 + λ)) with λ ≥ 0, and λ > 0 only on the sphere: λ found by bisection
    on its own."""
    center, eps, point = (t.double() for t in case)
    projected = L2Ball(center, eps, BOX).project(point)
    for i in range(len(center)):
        x, y, radius = center[i], point[i], eps[i]

        def at(multiplier, x=x, y=y):
            return ((y + multiplier * x) / (1 + multiplier)).clamp(*BOX)

        if (at(torch.tensor(0.0)) - x).norm() <= radius:
            expected = at(torch.tensor(0.0))
        elif radius == 0:
            expected = x
        else:
            low, high = 0.0, 1e12
            for _ in range(300):
                middle = (low * high) ** 0.5 if low > 0 and high / low > 4 else (low + high) / 2
                if (at(torch.tensor(middle, dtype=torch.float64)) - x).norm() > radius:
                    low = middle
                else:
                    high = middle
            expected = at(torch.tensor(high, dtype=torch.float64))
        torch.testing.assert_close(projected[i], expected, rtol=1e-6, atol=1e-8)


@given(st.sampled_from(sorted(NORMS)), cases(), st.integers(0, 99))
def test_projection_is_nearest_and_non_expansive(norm, case, seed):
    center, eps, point = (t.double() for t in case)
    ball = NORMS[norm](center, eps, BOX)
    projected = ball.project(point)
    torch.manual_seed(seed)
    other = point + torch.randn_like(point)
    other_projected = ball.project(other)
    assert ((projected - point).norm(dim=1) <= (other_projected - point).norm(dim=1) + 1e-9).all()
    assert ((projected - other_projected).norm(dim=1) <= (point - other).norm(dim=1) + 1e-9).all()


def test_linf_ball_in_float32_never_leaves_eps_in_float64():
    center = torch.rand(50, 1000)
    eps = torch.full((50,), 8 / 255, dtype=torch.float64)
    ball = LinfBall(center, eps, BOX)
    for corner in (center + 1, center - 1):
        assert (ball.distance(ball.project(corner)) <= eps).all()
        assert ball.distance(ball.project(corner)).min() > 8 / 255 - 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e30])
def test_l2_step_has_its_length_for_gradients_of_any_size(scale):
    center = torch.full((2, 5), 0.5)
    ball = L2Ball(center, torch.tensor([1.0, 1.0], dtype=torch.float64), BOX)
    grad = scale * torch.tensor([[3.0, 0, 0, 4.0, 0], [0.0] * 5])
    step = ball.ascend(center, grad, torch.tensor([0.5, 0.5])) - center
    torch.testing.assert_close(step, torch.tensor([[0.3, 0, 0, 0.4, 0], [0.0] * 5]))


def test_random_points_fill_the_ball():
    dim, n = 3, 20_000
    center = torch.zeros(n, dim)
    eps = torch.ones(n, dtype=torch.float64)
    keys = example_keys(0, torch.arange(n), 0)
    radii = L2Ball(center, eps, (-2, 2)).random_point(keys).norm(dim=1)
    assert radii.max() <= 1 + 1e-6
    # r^d is uniform
    torch.testing.assert_close((radii**dim).mean(), torch.tensor(0.5), rtol=0, atol=0.01)
    points = LinfBall(center, eps, (-2, 2)).random_point(keys)
    assert points.abs().max() <= 1 and points.abs().max() > 0.999
    torch.testing.assert_close(points.abs().mean(), torch.tensor(0.5), rtol=0, atol=0.01)


def test_random_numbers_depend_on_seed_example_and_restart_alone():
    indices = torch.tensor([5, 900, 7])
    draws = uniform(example_keys(3, indices, 1), (40,), torch.float32)
    alone = uniform(example_keys(3, torch.tensor([900]), 1), (40,), torch.float32)
    assert torch.equal(draws[1], alone[0])
    others = [
        uniform(example_keys(s, torch.tensor([i]), r), (40,), torch.float32)
        for s, i, r in ((3, 900, 0), (4, 900, 1), (3, 901, 1))
    ]
    assert all((other[0] - alone[0]).abs().max() > 0.1 for other in others)


def test_random_numbers_have_the_right_distribution():
    keys = example_keys(0, torch.arange(500), 0)
    u, z = uniform(keys, (200,), torch.float64), normal(keys, (200,), torch.float64)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02
    neighbours = torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1]
    examples = torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.015 and abs(examples) < 0.015


def test_seeds_of_any_size():
    for seed in (0, -1, 2**63, 2**64 + 5):
        assert uniform(example_keys(seed, torch.arange(2), 0), (3,), torch.float32).shape == (2, 3)
