"""One expert a token: the default of ``upcycle`` lets the task train the router."""

import copy
import warnings

import pytest
import torch
import twins

from ironmoe.moe import TopKRouter
from ironmoe.moe.adapters.upcycle import upcycle

DIM = twins.DIM


def gradient_of_the_task(moe):
    """While all experts are equal, and without auxiliary losses."""
    x = torch.randn(64, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moe.router.importance_weight = moe.router.load_weight = 0.0
    moe(x).square().sum().backward()
    return moe.router.weight.grad


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_by_default_the_task_alone_gives_the_router_a_gradient(score):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe = upcycle(twins.TimmMlp().double(), 4, 1, router={"score": score})
    assert moe.router.renormalize is False
    assert gradient_of_the_task(moe).abs().max() > 1e-3


def test_with_gates_that_are_1_it_does_not_and_a_warning_says_so():
    with pytest.warns(UserWarning, match="the task never trains the router") as caught:
        moe = upcycle(twins.TimmMlp().double(), 4, 1, renormalize=True)
    assert len(caught) == 1
    assert gradient_of_the_task(moe).abs().max() < 1e-12


@pytest.mark.parametrize("num_experts", [1, 2, 8, 64])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_gates_start_near_1_so_the_function_stays_near_what_it_was(score, num_experts):
    """The tolerances are two standard deviations of the largest of E logits, 0.002 · √D each."""
    dim = 64
    mlp = twins.TimmMlp(dim=dim, hidden=96).double().eval()
    x = torch.nn.functional.layer_norm(torch.randn(512, dim, dtype=torch.float64), (dim,))
    moe = upcycle(copy.deepcopy(mlp), num_experts, 1, router={"score": score})
    gates = moe.router(x).routing.gates
    largest_logit = 0.002 * dim**0.5 * (2 + (2 * torch.tensor(num_experts).log()) ** 0.5)
    assert (gates - 1).abs().max() < 1.5 * largest_logit
    torch.testing.assert_close(moe(x), gates * mlp(x), rtol=1e-9, atol=1e-9)
    if num_experts == 1 and score == "softmax":
        torch.testing.assert_close(moe(x), mlp(x), rtol=1e-9, atol=1e-9)


def test_a_scale_or_a_rule_of_the_user_stays():
    assert upcycle(twins.TimmMlp(), 4, 1, router={"scale": 2.5}).router.scale == 2.5
    plain = upcycle(twins.TimmMlp(), 4, 1, renormalize=False).router
    assert (plain.scale, plain.renormalize) == (1.0, False)
    two = upcycle(twins.TimmMlp(), 4, 2).router
    assert (two.scale, two.renormalize) == (1.0, True)
    assert 0.01 < two.weight.std() < 0.03 and 0.01 < plain.weight.std() < 0.03


def test_every_block_has_the_scale():
    model = upcycle(twins.Encoder(3), 6, 1)
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    assert [router.scale for router in routers] == pytest.approx([6.0] * 3)
