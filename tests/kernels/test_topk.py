from functools import partial

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ironmoe.kernels import ExpertGroups, topk_route
from ironmoe.kernels.scores import SCORES


@st.composite
def logits_and_k(draw):
    tokens, experts = draw(st.integers(0, 9)), draw(st.integers(1, 17))
    # A few integer values only: ties everywhere.
    values = draw(
        st.lists(st.integers(-2, 2), min_size=tokens * experts, max_size=tokens * experts)
    )
    return torch.tensor(values, dtype=torch.float64).view(tokens, experts), draw(
        st.integers(1, experts)
    )


def by_hand(keys: list[float], top_k: int) -> list[int]:
    return sorted(range(len(keys)), key=lambda e: (-keys[e], e))[:top_k]


@given(logits_and_k())
def test_ties_go_to_the_lower_index(case):
    logits, top_k = case
    routing = topk_route(logits, top_k)
    assert routing.experts.dtype == torch.int32
    assert routing.experts.tolist() == [by_hand(row, top_k) for row in logits.tolist()]
    torch.testing.assert_close(routing.gates, logits.softmax(-1).gather(1, routing.experts.long()))


@given(logits_and_k(), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_outputs(case, random):
    logits, top_k = case
    order = list(range(len(logits)))
    random.shuffle(order)
    plain, permuted = topk_route(logits, top_k), topk_route(logits[order], top_k)
    assert torch.equal(permuted.experts, plain.experts[order])
    assert torch.equal(permuted.gates, plain.gates[order])


@given(logits_and_k())
def test_renormalized_gates_sum_to_one(case):
    logits, top_k = case
    gates = topk_route(logits, top_k, renormalize=True).gates
    torch.testing.assert_close(gates.sum(1), torch.ones(len(logits), dtype=gates.dtype))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("order", ["score_first", "topk_first"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_every_combination_against_loops(score, order, renormalize):
    logits = torch.randn(7, 12, dtype=torch.float64)
    bias = torch.randn(12, dtype=torch.float64)
    apply = partial(oracle.score, score)
    routing = topk_route(
        logits, 3, score=score, order=order, renormalize=renormalize, selection_bias=bias, scale=1.5
    )
    for t in range(7):
        keys = apply(logits[t]) if order == "score_first" else logits[t]
        chosen = by_hand((keys + bias).tolist(), 3)
        gates = apply(logits[t])[chosen] if order == "score_first" else apply(logits[t][chosen])
        gates = 1.5 * (gates / gates.sum() if renormalize else gates)
        assert routing.experts[t].tolist() == chosen
        torch.testing.assert_close(routing.gates[t], gates)


@pytest.mark.parametrize("score", ["max", "top2_sum"])
def test_groups_keep_only_the_best(score):
    logits = torch.randn(20, 12, dtype=torch.float64)
    routing = topk_route(logits, 3, groups=ExpertGroups(4, 2, score))
    for t in range(20):
        groups = logits[t].softmax(-1).view(4, 3)
        members = 1 if score == "max" else 2
        best = by_hand([sum(sorted(g, reverse=True)[:members]) for g in groups.tolist()], 2)
        assert {int(e) // 3 for e in routing.experts[t]} <= set(best)


def test_gates_are_float32_or_wider():
    assert topk_route(torch.randn(3, 4, dtype=torch.bfloat16), 2).gates.dtype == torch.float32
    assert topk_route(torch.randn(3, 4, dtype=torch.float64), 2).gates.dtype == torch.float64


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("order", ["score_first", "topk_first"])
def test_gradient(score, order):
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: topk_route(z, 2, score=score, order=order, renormalize=True).gates, logits
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k must be from 1 to 4.*got 0"),
        ({"top_k": 5}, "top_k must be from 1 to 4.*got 5"),
        ({"score": "relu"}, "score must be one of .*got 'relu'"),
        ({"order": "x"}, "order must be one of"),
        ({"selection_bias": torch.zeros(3)}, "selection_bias must have shape"),
        ({"groups": ExpertGroups(3, 1)}, "groups must split"),
        ({"groups": ExpertGroups(2, 1), "top_k": 3}, "top_k must be from 1 to 2"),
        ({"groups": ExpertGroups(2, 1, "mean")}, "groups.score"),
        ({"logits": torch.zeros(2, 3, 4)}, "logits must be a float tensor"),
        ({"logits": torch.zeros(2, 4, dtype=torch.int64)}, "logits must be a float tensor"),
        (
            {"logits": torch.tensor([[0.0, 1, 2, 3], [0, float("nan"), 0, 0]])},
            "NaN first at token 1",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"logits": torch.zeros(2, 4), "top_k": 2} | change
    with pytest.raises(ValueError, match=message):
        topk_route(**arguments)
