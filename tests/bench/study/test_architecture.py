"""What kind of arm a model is that was handed in."""

import pytest
import torch

from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.work.architecture import arm_of
from ironmoe.moe import ExpertChoiceRouter, MoE, VMoE


def arm(**how):
    torch.manual_seed(0)
    settings = {"moe_layers": [1], "num_experts": 4, "top_k": 2} | how
    model = VMoE(8, 4, 16, 2, 2, 16, 3, channels=1, **settings)
    return arm_of("it", model.eval(), torch.rand(1, 1, 8, 8), equal_cost=True)


def router(**options):
    return {"router": options}


SOURCE, TO_ONE = Arm("it", 4, 2), Arm("it", 4, 2, renormalize=True)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"moe_layers": []}, Arm("it")),
        ({}, SOURCE),
        (router(renormalize=True), TO_ONE),
        (router(order="topk_first"), TO_ONE),
        (router(score="sigmoid"), SOURCE),
        (router(score="sigmoid", renormalize=True, selection_bias=True), TO_ONE),
        (router(renormalize=2.0), SOURCE),
        (router(renormalize=True, scale=2.5), SOURCE),
        ({"top_k": 1} | router(renormalize=True), Arm("it", 4, 1, renormalize=True)),
        ({"top_k": 4}, Arm("it", 4, 4)),
        ({"num_experts": 32, "top_k": 31}, Arm("it", 32, 31)),  # their sum is nearly 1
        ({"top_k": 4} | router(renormalize=True), Arm("it", 4, 4)),
        ({"top_k": 4} | router(score="sigmoid"), Arm("it", 4, 0)),
    ],
)
def test_gates_are_those_that_the_router_gives_whatever_it_is_called(how, expected):
    assert arm(**how) == expected


def test_a_confident_router_is_no_other_architecture():
    """Its gates sum to 1 all but exactly on this image, and those of another seed do not."""
    torch.manual_seed(0)
    model = VMoE(8, 4, 16, 2, 2, 16, 3, channels=1, moe_layers=[1], num_experts=4)
    model.blocks[1].mlp.router.weight.data *= 1e4
    assert arm_of("it", model.eval(), torch.rand(1, 1, 8, 8), equal_cost=True) == SOURCE


def test_experts_that_choose_tokens_give_no_k():
    def layer():
        return MoE(16, 16, 4, router=ExpertChoiceRouter(16, 4, 2.0, images_per_group=1))

    assert arm(make_moe=layer) == Arm("it", 4, 0)
