"""A model with offloaded experts computes what it computes without."""

import contextlib

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from ironmoe.attacks import PGD, evaluate
from ironmoe.moe import (
    Capacity,
    EnsembleRouter,
    ExpertChoiceRouter,
    MoE,
    SoftMoE,
    VMoE,
    intervene,
    offload_experts,
    trace_routing,
    upcycle,
)
from ironmoe.moe.example import ARGUMENTS, trained_example
from ironmoe.moe.metrics import expert_outputs
from ironmoe.moe.policies import OneExpert, RandomExperts

DIM, EXPERTS = 9, 6  # rows of weights that end at no multiple of a cache line
LAYERS = {
    "moe": lambda: MoE(DIM, 7, EXPERTS),
    "one choice, no bias": lambda: MoE(DIM, 7, EXPERTS, 1, bias=False),
    "one expert": lambda: MoE(DIM, 7, 1),
    "all chosen": lambda: MoE(DIM, 7, EXPERTS, EXPERTS),
    "shared, gated": lambda: MoE(
        DIM, 7, EXPERTS, activation="swiglu", shared_dim=5, shared_gate=True
    ),
    "recomputed": lambda: MoE(DIM, 7, EXPERTS, recompute=True),
    "capacity": lambda: MoE(DIM, 7, EXPERTS, capacity=Capacity(0.5)),
    "rounded": lambda: MoE(DIM, 7, EXPERTS, dispatch_dtype=torch.bfloat16),
    "expert choice": lambda: MoE(DIM, 7, EXPERTS, router=ExpertChoiceRouter(DIM, EXPERTS)),
    "ensemble": lambda: MoE(
        DIM, 7, EXPERTS, router=EnsembleRouter(DIM, EXPERTS, 1, ensemble_size=2)
    ),
    "soft": lambda: SoftMoE(DIM, 7, EXPERTS, 2),
}
KEEP = (0, 2, EXPERTS, EXPERTS + 3)


def layer_of(kind):
    torch.manual_seed(0)
    return LAYERS[kind]().eval()


def tokens(seed, count=4, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, dim, generator=generator).requires_grad_()


def result_and_gradient(model, x, *more):
    y = model(x, *more)
    return y.detach(), torch.autograd.grad(y.square().sum(), [x])[0]


def all_equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_input_gradients_have_the_same_bits(kind, keep):
    layer = layer_of(kind)
    # few tokens use other experts each time; none uses no expert
    batches = [tokens(seed, count) for seed, count in enumerate((1, 2, 9, 0, 1, 2))]

    def passes():
        found = [part for x in batches for part in result_and_gradient(layer, x)]
        with torch.inference_mode():
            found += [layer(x) for x in batches]
        # what inference left on the device serves a pass that records
        return [*found, *result_and_gradient(layer, batches[-1])]

    expected = passes()
    with offload_experts(layer, keep=keep):
        assert all_equal(passes(), expected)


@pytest.mark.parametrize("kind", ["moe", "soft", "capacity", "expert choice"])
def test_masked_tokens_and_autocast_change_nothing(kind):
    layer, x = layer_of(kind), tokens(0)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]]).bool()
    expected = result_and_gradient(layer, x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        expected_16 = result_and_gradient(layer, x)
    with offload_experts(layer, keep=2):
        assert all_equal(result_and_gradient(layer, x, mask), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert all_equal(result_and_gradient(layer, x), expected_16)
        assert all_equal(result_and_gradient(layer, x, mask), expected)


@pytest.mark.parametrize("kind", ["moe", "recomputed", "rounded", "soft"])
def test_derivatives_of_any_order_are_right(kind):
    layer = layer_of(kind).double()
    x = tokens(1, 2)[:1].detach().double().requires_grad_()
    if kind == "rounded":
        layer.dispatch_dtype = torch.float64  # its own path, without the jumps of rounding

    with offload_experts(layer, keep=1):
        assert gradcheck(layer, x)
        assert gradgradcheck(layer, x)


def test_a_second_backward_pass_and_one_after_the_block_are_right():
    layer, x = layer_of("moe"), tokens(1)
    _, expected = result_and_gradient(layer, x)
    with offload_experts(layer):
        loss = layer(x).square().sum()
        (first,) = torch.autograd.grad(loss, [x], retain_graph=True)
    (second,) = torch.autograd.grad(loss, [x])
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_torch_func_transforms_are_right():
    layer, x = layer_of("moe").double(), tokens(1, 3).detach().double()

    def loss(x):
        return layer(x).sin().sum()

    def derivatives():
        return (
            torch.func.grad(loss)(x),
            torch.func.vmap(torch.func.grad(loss))(torch.stack([x, -x])),
            torch.func.jvp(loss, (x,), (x.cos(),))[1],
        )

    expected = derivatives()
    with offload_experts(layer, keep=2):
        assert all_equal(derivatives(), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_and_hooks_on_saved_tensors_go_on_around_it(reentrant):
    layer, x = layer_of("moe"), tokens(2)
    _, expected = result_and_gradient(layer, x)
    with offload_experts(layer):
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        with torch.autograd.graph.save_on_cpu():
            _, moved = result_and_gradient(layer, x)
    assert torch.equal(x.grad, expected)
    assert torch.equal(moved, expected)


def test_interventions_and_traces_work_inside():
    model, images, _ = trained_example(4)
    policies = (OneExpert(3), RandomExperts(seed=1))

    def seen():
        results = []
        for policy in policies:
            with intervene(model, policy), trace_routing(model) as trace:
                results.append(model(images))
            results += [layer.experts for layer in trace.layers.values()]
        return results

    with torch.no_grad():
        expected = seen()
        with offload_experts(model):
            assert all_equal(seen(), expected)


def test_what_each_expert_makes_of_a_token_is_the_same():
    layer, x_TD = layer_of("moe"), tokens(0)[0].detach()
    expected = expert_outputs(layer, x_TD)
    with offload_experts(layer, keep=1):
        assert torch.equal(expert_outputs(layer, x_TD), expected)


def test_an_upcycled_and_a_compiled_model_are_offloaded():
    torch.manual_seed(0)
    dense = VMoE(**{**ARGUMENTS, "moe_layers": ()})
    model = upcycle(dense, 4, noise=0.1).eval()
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    expected = result_and_gradient(model, x)
    with offload_experts(model) as offload:
        assert all_equal(result_and_gradient(torch.compile(model), x), expected)
    assert offload.copied_bytes > 0


def test_an_attack_gives_the_same_verdicts():
    model, images, labels = trained_example(24)
    attacks = {"pgd": PGD(model, steps=5)}

    def report(offloaded):
        block = offload_experts(model, keep=3) if offloaded else contextlib.nullcontext()
        with block:
            return evaluate(model, [(images, labels)], attacks, eps=[0.1], checks=False)

    assert report(True).as_dict()["attacks"] == report(False).as_dict()["attacks"]
