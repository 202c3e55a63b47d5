import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ironmoe.attacks.balls.ball import ball_of

NORMS = ["Linf", "L2", "L1"]
BOX = (-1.0, 2.0)


@st.composite
def cases(draw):
    """(point, weight, value): pixels on faces, weights of 0 and of any scale, hyperplanes near, far
    and out of reach."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    batch, dim = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    point = BOX[0] + 3 * torch.rand(batch, dim, dtype=dtype)
    point = torch.where(
        torch.rand(batch, dim) < 0.3,
        torch.where(torch.rand(batch, dim) < 0.5, *BOX).to(dtype),
        point,
    )
    weight = torch.randn(batch, dim, dtype=dtype) * draw(st.sampled_from([1e-20, 1.0, 1e10]))
    weight = torch.where(torch.rand(batch, dim) < 0.2, 0, weight)
    weight = torch.where(torch.rand(batch, 1) < 0.2, weight.sign(), weight)  # ties
    reach = (weight.abs() * 3).sum(1)
    value = (
        draw(st.sampled_from([0.0, 1e-3, 0.1, 0.5, 2.0])) * reach * torch.randn(batch, dtype=dtype)
    )
    return point, weight, value


def shortest(point, weight, value, norm):
    """(steps, whether the hyperplane is reached), float64: by bisection on how far pixels go; in L1
    filled one after another."""
    size, room = (
        weight.abs(),
        torch.where(value[:, None] * weight > 0, point - BOX[0], BOX[1] - point),
    )
    direction = -torch.sign(value)[:, None] * weight.sign()
    reached = (size * room).sum(1) > value.abs()
    if norm == "L1":
        taken = torch.zeros_like(size)
        for row, needed in enumerate(value.abs().tolist()):
            for i in size[row].argsort(descending=True).tolist():
                if size[row, i] > 0:
                    taken[row, i] = min(float(room[row, i]), needed / float(size[row, i]))
                    needed -= float(size[row, i] * taken[row, i])
        return direction * taken, reached
    speed = (
        size / size.amax(1, keepdim=True).clamp_min(1e-300)
        if norm == "L2"
        else torch.ones_like(size)
    )
    low, high = (
        torch.zeros(len(size), 1, dtype=torch.float64),
        torch.full((len(size), 1), 1e9, dtype=torch.float64),
    )
    for _ in range(100):
        middle = (low + high) / 2
        short = (size * (middle * speed).minimum(room)).sum(1, keepdim=True) < value.abs()[:, None]
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return direction * (high * speed).minimum(room), reached


@pytest.mark.parametrize("norm", NORMS)
@given(case=cases())
def test_shortest_step_that_reaches_the_hyperplane(norm, case):
    point, weight, value = case
    step = ball_of(norm).step_to_hyperplane(point, weight, value, BOX)
    assert step.dtype == point.dtype and step.shape == point.shape
    assert (point + step).min() >= BOX[0] - 1e-6 and (point + step).max() <= BOX[1] + 1e-6
    assert (step[weight == 0] == 0).all()
    slack = 1e-9 if point.dtype == torch.float64 else 1e-5
    point, weight, value, step = (t.double() for t in (point, weight, value, step))
    expected, reached = shortest(point, weight, value, norm)
    left = (value + (weight * step).sum(1)).abs()
    assert (left[reached] <= slack * (weight.abs() * 3).sum(1)[reached]).all()
    torch.testing.assert_close(step[~reached], expected[~reached], rtol=0, atol=slack)
    assert (
        ball_of(norm).length(step) <= ball_of(norm).length(expected) * (1 + slack) + slack
    ).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_closed_form_without_a_box(norm, scale):
    """|value| / ‖weight‖ in the dual norm."""
    point, weight = 9 * torch.randn(20, 3, 4, 5), scale * torch.randn(20, 3, 4, 5)
    value = scale * torch.randn(20)
    step = ball_of(norm).step_to_hyperplane(point, weight, value, (-math.inf, math.inf))
    torch.testing.assert_close(
        ball_of(norm).length(step), value.abs() / ball_of(norm).dual_length(weight)
    )
    left = value.double() + (weight.double() * step.double()).flatten(1).sum(1)
    torch.testing.assert_close(
        left / scale, torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_steps_by_hand():
    """2x + y = −value from a corner of the unit square: to the line, around the first pixel's face,
    to the far corner, nowhere."""
    point, weight = torch.zeros(1, 2), torch.tensor([[2.0, 1.0]])
    for norm, value, expected in (
        ("Linf", -1.5, [0.5, 0.5]), ("L2", -2.5, [1.0, 0.5]), ("L2", -1.0, [0.4, 0.2]),
        ("L1", -1.5, [0.75, 0.0]),
        ("L1", -2.5, [1.0, 0.5]), ("L2", -9.0, [1.0, 1.0]), ("L1", 4.0, [0.0, 0.0]),
    ):  # fmt: skip
        step = ball_of(norm).step_to_hyperplane(point, weight, torch.tensor([value]), (0.0, 1.0))
        torch.testing.assert_close(step, torch.tensor([expected]))


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_no_step(norm):
    point = torch.rand(3, 7)
    value = torch.tensor([1.0, 0.0, -3e38])
    assert torch.equal(
        ball_of(norm).step_to_hyperplane(point, torch.zeros(3, 7), value, (0.0, 1.0)),
        torch.zeros(3, 7),
    )


@pytest.mark.parametrize("norm", NORMS)
def test_a_large_image_in_float32(norm):
    point, weight = torch.rand(4, 3, 64, 64), torch.randn(4, 3, 64, 64)
    value = torch.tensor([1e-3, 5.0, -500.0, 2000.0])
    step = ball_of(norm).step_to_hyperplane(point, weight, value, (0.0, 1.0))
    left = value.double() + (weight.double() * step.double()).flatten(1).sum(1)
    assert (left.abs() <= 2e-6 * value.abs()).all()


@pytest.mark.parametrize("norm", NORMS)
def test_rows_do_not_depend_on_their_batch(norm):
    point, weight, value = torch.rand(9, 40), torch.randn(9, 40).round(decimals=1), torch.randn(9)
    steps = ball_of(norm).step_to_hyperplane(point, weight, value, (0.0, 1.0))
    for row in range(9):
        one = slice(row, row + 1)
        assert torch.equal(
            ball_of(norm).step_to_hyperplane(point[one], weight[one], value[one], (0.0, 1.0)),
            steps[one],
        )


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_waits_for_the_device(norm):
    with FakeTensorMode():
        assert ball_of(norm).step_to_hyperplane(
            torch.rand(2, 5), torch.rand(2, 5), torch.rand(2), (0.0, 1.0)
        ).shape == (2, 5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_length_at_any_scale(scale):
    step = torch.tensor([[[3.0, 0.0], [-4.0, 0.0]]]) * scale
    for norm, expected in (("Linf", 4.0), ("L2", 5.0), ("L1", 7.0)):
        torch.testing.assert_close(ball_of(norm).length(step), torch.tensor([expected * scale]))
