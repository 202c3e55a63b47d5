"""Activation checkpointing runs a forward again in the backward pass: it is steered as the first
run was, and traces and counts do not see it again."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ironmoe.attacks import PGD
from ironmoe.attacks.routing.divergence import RoutingDivergence
from ironmoe.moe import Capacity, MoE, RouterHealth, VMoE, intervene, trace_routing
from ironmoe.moe.policies import RandomExperts

D, F, E, K, T = 6, 10, 5, 2, 12


class Checkpointed(nn.Module):
    """Two layers, the backward pass of which runs them again."""

    def __init__(self, reentrant, capacity=None):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.layers = nn.ModuleList(
            MoE(D, F, E, K, capacity=capacity, dtype=torch.float64).eval() for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            if self.reentrant is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def tokens():
    torch.manual_seed(1)
    return torch.randn(T, D, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("capacity", [None, Capacity(places=3)], ids=str)
def test_traces_and_health_do_not_count_a_recomputed_forward(reentrant, capacity):
    found = []
    for mode in (None, reentrant):
        model = Checkpointed(mode, capacity)
        with trace_routing(model) as trace, RouterHealth(model) as health:
            model(tokens()).sum().backward()
        assert all(len(layer.gates) == T for layer in trace.layers.values())
        found.append((health.read(), [layer.experts for layer in trace.layers.values()]))
        assert len(model.layers[0].router._forward_hooks) == 0
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_second_forward_before_the_backward_pass_does_count():
    model = Checkpointed(False)
    with trace_routing(model) as trace:
        (model(tokens()) + model(tokens())).sum().backward()
    assert all(len(layer.gates) == 2 * T for layer in trace.layers.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_is_steered_as_the_first_one(reentrant):
    grads = []
    for mode in (None, reentrant):
        model, x = Checkpointed(mode), tokens()
        with intervene(model, RandomExperts(seed=3)), trace_routing(model) as trace:
            model(x).square().sum().backward()
        assert all(len(layer.gates) == T for layer in trace.layers.values())
        grads.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


class CheckpointedBlocks(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        for block in model.blocks:
            block.forward = self.recomputed(block.forward)

    @staticmethod
    def recomputed(forward):
        return lambda x, *args, **kwargs: checkpoint(
            forward, x, *args, use_reentrant=False, **kwargs
        )

    def forward(self, x):
        return self.model(x)


def test_an_attack_on_routing_sees_one_pass_of_a_checkpointed_model():
    def vit():
        torch.manual_seed(0)
        model = VMoE(8, 4, 8, 2, 2, 16, 3, moe_layers=(0, 1), num_experts=E, channels=1).eval()
        nn.init.normal_(model.head.weight)
        return model

    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    results = [
        PGD(model, eps=0.1, steps=3, routing=RoutingDivergence())(images, labels)
        for model in (vit(), CheckpointedBlocks(vit()))
    ]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_hugging_face_gradient_checkpointing_is_counted_once(reentrant):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, vocab_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).train()
    ids = torch.randint(0, 32, (2, 7))
    with trace_routing(model) as plain, RouterHealth(model) as health:
        model(ids, labels=ids).loss.backward()
    right = health.read()

    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with trace_routing(model) as trace, RouterHealth(model) as health:
        model(ids, labels=ids).loss.backward()
    assert health.read() == right and len(right) == 2 * 9
    for name, layer in trace.layers.items():
        assert torch.equal(layer.experts, plain.layers[name].experts)
        assert len(layer.logits) == 14
