"""The units and their slopes against their definitions, differentiated by torch itself: at the
cuts, beyond them, and where NaN is."""

import oracle
import pytest
import torch

from ironmoe.kernels import ACTIVATIONS

POINTS = torch.tensor(
    [-40, -10.5, -10, -9.5, -7.5, -7, -6.5, -1, 0, 0.3, 6.5, 7, 7.5, 9.5, 10, 10.5, 40]
).double()
INTERLEAVED = [name for name, act in ACTIVATIONS.items() if act.interleaved]
CUT = {name: act.limit for name, act in ACTIVATIONS.items() if act.limit is not None}


def grid(gated):
    """Every pair of points as (gate, up), or every point."""
    return torch.cartesian_prod(POINTS, POINTS) if gated else POINTS.view(-1, 1)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_values_and_slopes_are_those_of_the_definition(act, recorded):
    """Also at the limits, where torch.clamp passes the gradient on, and where autograd records the
    slopes."""
    hidden = grid(ACTIVATIONS[act].gated).requires_grad_()
    expected = oracle.activation(act, hidden)
    grad = torch.linspace(-2, 2, len(hidden)).double().view(-1, 1)
    (slopes,) = torch.autograd.grad(expected, hidden, grad)
    h, g = (hidden, grad.requires_grad_()) if recorded else (hidden.detach(), grad)
    torch.testing.assert_close(ACTIVATIONS[act].value(h), expected)
    torch.testing.assert_close(ACTIVATIONS[act].backward(g, h), slopes)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_second_derivatives_on_both_sides_of_the_cuts(act):
    hidden = (torch.randn(4, 6, dtype=torch.float64) * 8).requires_grad_()
    wide = ACTIVATIONS[act].gated
    grad = torch.randn(4, 3 if wide else 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ACTIVATIONS[act].backward, (grad, hidden))
    assert torch.autograd.gradgradcheck(ACTIVATIONS[act].value, hidden)


@pytest.mark.parametrize(("act", "limit"), CUT.items())
def test_slopes_are_zero_beyond_the_limit_and_not_at_it(act, limit):
    beyond = limit + 1e-3
    hidden = torch.tensor(
        [
            [limit, limit],
            [beyond, 1.0],
            [1.0, beyond],
            [1.0, -beyond],
            [1.0, -limit],
            [-beyond, 1.0],
        ]
    )
    nonzero = ACTIVATIONS[act].backward(torch.ones(6, 1), hidden) != 0
    assert nonzero.tolist() == [
        [True, True],
        [False, True],
        [True, False],
        [True, False],
        [True, True],
        [True, True],
    ]


@pytest.mark.parametrize("act", CUT)
def test_infinity_is_cut_and_nan_is_not(act):
    inf, nan = float("inf"), float("nan")
    limit = CUT[act]
    values = ACTIVATIONS[act].value(
        torch.tensor(
            [[inf, inf], [limit, limit], [1.0, -inf], [1.0, -limit], [nan, 1.0], [1.0, nan]]
        )
    )
    assert values[0] == values[1] and values[2] == values[3] and values[4:].isnan().all()


@pytest.mark.parametrize("act", INTERLEAVED)
def test_interleaved_columns_are_the_concatenated_ones_in_another_order(act):
    hidden, grad = torch.randn(2, 9, 10) * 6, torch.randn(2, 9, 5)
    order = torch.cat([torch.arange(0, 10, 2), torch.arange(1, 10, 2)])
    turns, halves = ACTIVATIONS[act], ACTIVATIONS[act.removesuffix("_interleaved")]
    assert torch.equal(turns.value(hidden), halves.value(hidden[..., order]))
    assert torch.equal(
        turns.backward(grad, hidden)[..., order], halves.backward(grad, hidden[..., order])
    )
