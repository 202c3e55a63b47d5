"""Every score of the table against its definition, differentiated by torch itself; a name that is
not in the table is an error wherever it is given."""

import oracle
import pytest
import torch

from ironmoe.kernels import topk_route
from ironmoe.kernels.scores import SCORES
from ironmoe.kernels.topk import gates_of_choice, topk_route_backward_op, topk_route_op
from ironmoe.kernels.types import GateRule
from ironmoe.moe import TopKRouter

KNOWN = "score must be one of .*" + ".*".join(SCORES)


def logits():
    """Three tokens, from far below 0 to far above."""
    return (torch.linspace(-12, 12, 21).double().view(3, 7)).requires_grad_()


@pytest.mark.parametrize("score", SCORES)
def test_value_and_derivative_are_those_of_the_definition(score):
    z, d_score = logits(), torch.randn(3, 7, dtype=torch.float64)
    want = oracle.score(score, z)
    torch.testing.assert_close(SCORES[score].value(z), want)
    (want_d,) = torch.autograd.grad(want, z, d_score)
    torch.testing.assert_close(SCORES[score].backward(d_score, z), want_d)


@pytest.mark.parametrize("score", SCORES)
def test_second_derivatives(score):
    d_score = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SCORES[score].backward, (d_score, logits()))
    assert torch.autograd.gradgradcheck(SCORES[score].value, logits())


@pytest.mark.parametrize("score", SCORES)
def test_fields_say_what_the_values_are(score):
    """joint: moving one logit moves other scores. nonnegative: none is below 0."""
    z = logits()
    jacobian = torch.autograd.functional.jacobian(SCORES[score].value, z.detach()[1])
    moves_others = bool((jacobian - jacobian.diag().diag()).count_nonzero())
    assert moves_others == SCORES[score].joint
    assert bool((SCORES[score].value(z) >= 0).all()) == SCORES[score].nonnegative


@pytest.mark.parametrize(
    "call",
    [
        lambda z, k: topk_route(z, 2, score="relu"),
        lambda z, k: gates_of_choice(z, k.long(), GateRule("relu")),
        lambda z, k: topk_route_op(z, 2, "relu", "score_first", False, None, 1, 1, "max", 1.0),
        lambda z, k: topk_route_backward_op(z[:, :2], z, k, "relu", "score_first", False, 1.0),
        lambda z, k: TopKRouter(7, 4, score="relu"),
    ],
    ids=["twin", "gates", "operator", "backward", "router"],
)
@pytest.mark.parametrize("interpreted", [False, True])
def test_an_unknown_score_is_an_error_that_names_the_known_ones(call, interpreted, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    with pytest.raises(ValueError, match=KNOWN):
        call(logits().detach().float(), torch.zeros(3, 2, dtype=torch.int32))


def test_an_unknown_score_is_an_error_while_shapes_are_traced():
    traced = logits().detach().float().to("meta")
    with pytest.raises(ValueError, match=KNOWN):
        topk_route_op(traced, 2, "relu", "score_first", False, None, 1, 1, "max", 1.0)
