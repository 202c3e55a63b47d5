"""One expert a token whose gate is always 1: the task does not train the router, and a warning says
so."""

import warnings

import pytest
import torch

from ironmoe.moe import Capacity, MoE, TopKRouter
from ironmoe.moe.routers.ensemble import EnsembleRouter

DIM, EXPERTS = 6, 4


def gradient_of_the_task(moe):
    x = torch.randn(32, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moe = moe.double()
    moe.router.importance_weight = moe.router.load_weight = 0.0
    moe(x).square().sum().backward()
    return moe.router.weight.grad


def build(router, **capacity):
    return MoE(
        DIM,
        8,
        EXPERTS,
        1,
        router=TopKRouter(DIM, EXPERTS, 1, **router),
        capacity=Capacity(1.0, **capacity) if capacity else None,
    )


@pytest.mark.parametrize(
    ("router", "capacity", "remedy"),
    [
        ({"renormalize": True}, {}, "Set renormalize=False in the router"),
        ({"renormalize": 2.0}, {}, "Set renormalize=False in the router"),
        ({"renormalize": True, "score": "sigmoid"}, {}, "Set renormalize=False in the router"),
        ({"renormalize": True, "scale": 2.5}, {}, "Set renormalize=False in the router"),
        (
            {"order": "topk_first"},
            {},
            "Set order='score_first' and renormalize=False in the router",
        ),
        (
            {"order": "topk_first", "renormalize": True},
            {},
            "Set order='score_first' and renormalize=False in the router",
        ),
        ({}, {"renormalize": True}, "Set renormalize=False in the capacity"),
        (
            {"score": "sigmoid", "order": "topk_first"},
            {"renormalize": True},
            "Set renormalize=False in the capacity",
        ),
    ],
)
def test_gates_that_are_always_the_same_are_warned_of_once(router, capacity, remedy):
    with pytest.warns(UserWarning, match="the task never trains the router") as caught:
        moe = build(router, **capacity)
    assert len(caught) == 1 and remedy in str(caught[0].message)
    assert gradient_of_the_task(moe).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("router", "capacity"),
    [
        ({}, {}),
        ({"score": "sigmoid"}, {"renormalize": False}),
        ({"score": "sigmoid", "order": "topk_first"}, {}),
        ({"score": "sqrtsoftplus", "order": "topk_first"}, {}),
    ],
)
def test_other_gates_are_trained_by_the_task_without_a_word(router, capacity):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe = build(router, **capacity)
    assert gradient_of_the_task(moe).abs().max() > 1e-6


def test_where_there_is_no_choice_and_on_trial_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopKRouter(DIM, 1, 1, renormalize=True)
        TopKRouter(DIM, EXPERTS, 2, renormalize=True)
        TopKRouter(DIM, EXPERTS, 1, renormalize=True, device="meta")
        layer = MoE.as_mlp_layer(EXPERTS, 1, router={"renormalize": True})
    with pytest.warns(UserWarning, match="the task never trains the router") as caught:
        layer(DIM, 8)
    assert len(caught) == 1


def test_members_of_an_ensemble_are_warned_of_too():
    with pytest.warns(UserWarning, match="the task never trains the router"):
        EnsembleRouter(DIM, EXPERTS, 1, ensemble_size=2, renormalize=True)
