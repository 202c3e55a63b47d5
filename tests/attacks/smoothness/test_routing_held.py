"""Held routing: the experts and gates of other images, on the images that the model takes."""

import pytest
import torch
from smoothness_models import dense, images_of, vmoe
from torch import nn

from ironmoe.attacks.smoothness import ROUTINGS, held_routing, is_routed
from ironmoe.moe import Capacity, ExpertChoiceRouter, MoE, SoftMoE, trace_routing

CAPACITY = Capacity(0.75, images_per_group=1, multiple_of=1)


def routed(model, images):
    with trace_routing(model) as trace:
        logits = model(images)
    return logits, trace.layers


@pytest.fixture
def pair():
    """Images and others beside them, which are routed otherwise."""
    x = images_of(3)
    return x, (x + 0.3 * torch.randn_like(x)).clamp(0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": {"renormalize": True}},
        {"capacity": CAPACITY},
        {"ensemble_size": 2, "num_experts": 6},
    ],
)
def test_tokens_keep_their_experts_and_their_gates_or_get_fresh_ones(pair, options):
    model = vmoe(**options)
    x, other = pair
    _, at_x = routed(model, x)
    free_logits, free = routed(model, other)
    with held_routing(model, x, "gates_frozen"):
        _, constant = routed(model, other)
    with held_routing(model, x, "frozen"):
        _, fresh = routed(model, other)

    first, *_ = at_x
    for name, layer in at_x.items():
        for held in (constant[name], fresh[name]):
            assert torch.equal(held.experts, layer.experts)
        assert torch.equal(constant[name].gates, layer.gates)
        assert not torch.allclose(fresh[name].gates, layer.gates)
        assert not torch.equal(free[name].experts, layer.experts)

    # What lies before the first routed layer is free: the router gives the gates of its present
    # logits, by its own rule, to the choices that were not dropped.
    router = model.get_submodule(first).router
    chosen, kept = at_x[first].intended.experts, at_x[first].kept
    own = router.gates_of(free[first].logits, chosen).masked_fill(~kept, 0)
    torch.testing.assert_close(fresh[first].gates, own)
    torch.testing.assert_close(model(other), free_logits)  # nothing is held behind the block


@pytest.mark.parametrize("routing", ROUTINGS)
def test_at_the_images_themselves_nothing_changes(routing):
    model = vmoe()
    x = images_of(3)
    expected = model(x)
    with held_routing(model, x, routing):
        torch.testing.assert_close(model(x), expected)


def test_constant_gates_carry_no_gradient_and_fresh_ones_do(pair):
    model, x, other = vmoe(moe_layers=(1,)), *pair
    router = model.blocks[1].mlp.router
    slopes = {}
    for routing in ROUTINGS:
        with held_routing(model, x, routing):
            logits = model(other)
        slopes[routing] = torch.autograd.grad(logits.sum(), router.weight, allow_unused=True)[0]
    assert slopes["gates_frozen"] is None
    assert slopes["frozen"].abs().max() > 0 and slopes["free"].abs().max() > 0


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_dense_model_is_the_same_under_every_routing(pair, routing):
    model, (x, other) = dense(), pair
    assert not is_routed(model) and not is_routed(lambda images: images) and is_routed(vmoe())
    expected = model(other)
    with held_routing(model, x, routing):
        assert torch.equal(model(other), expected)


def test_a_soft_moe_has_no_choice_to_hold_and_no_gates_either(pair):
    model = vmoe(make_moe=lambda: SoftMoE(12, 16, 4, 2, activation="gelu_tanh"))
    x, other = pair
    assert not is_routed(model)
    with held_routing(model, x, "frozen"):
        model(other)
    with (
        pytest.raises(ValueError, match="Soft MoE, whose mixtures are no gates"),
        held_routing(model, x, "gates_frozen"),
    ):
        pass


def test_errors_name_what_is_allowed(pair):
    model, (x, _) = vmoe(), pair
    with (
        pytest.raises(ValueError, match=r"routing must be one of \('free', .* got 'held'"),
        held_routing(model, x, "held"),
    ):
        pass
    with (
        held_routing(model, x, "gates_frozen"),
        pytest.raises(ValueError, match=r"the 3 images whose .* 12 tokens in .* got 8 tokens"),
    ):
        model(x[:2])

    router = ExpertChoiceRouter(12, 4, 1.0, images_per_group=1, multiple_of=1)
    by_experts = vmoe(make_moe=lambda: MoE(12, 16, 4, router=router, activation="gelu_tanh"))
    with (
        held_routing(by_experts, x, "frozen"),
        pytest.raises(ValueError, match='must be "free" or "gates_frozen" where a router does not'),
    ):
        by_experts(x)


def test_the_model_is_asked_with_what_else_it_takes(pair):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vmoe()

        def forward(self, images, shift):
            return self.inner(images + shift)

    model, (x, other) = Shifted(), pair
    shift = torch.full_like(x, 0.1)
    _, at_x = routed(model.inner, x + shift)
    with (
        held_routing(model, x, "gates_frozen", lambda images: model(images, shift)),
        trace_routing(model) as trace,
    ):
        model(other, shift)
    for name, layer in trace.layers.items():
        assert torch.equal(layer.experts, at_x[name.removeprefix("inner.")].experts)
