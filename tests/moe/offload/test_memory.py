"""What an offload copies, and what it leaves on the device."""

import pytest
import torch

from ironmoe.bench.benchmarks.offload.live_memory import LiveMemory
from ironmoe.moe import MoE, SoftMoE, VMoE, intervene, offload_experts, trace_routing
from ironmoe.moe.policies import MaskExperts, OneExpert

DEPTH, EXPERTS, DIM, HIDDEN = 6, 8, 16, 512
OF_ONE = 4 * (2 * DIM * HIDDEN + DIM + HIDDEN)  # bytes of one expert
OF_LAYER = EXPERTS * OF_ONE
IMAGES = torch.rand(1, 1, 8, 8)  # of four tokens, and one for the class


def vit(**options):
    torch.manual_seed(0)
    return VMoE(
        8, 4, DIM, DEPTH, 2, 16, 3, "all", EXPERTS, channels=1, expert_dim=HIDDEN, **options
    ).eval()


def pass_of(model, images=IMAGES):
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).sum(), [images])
    return gradient


def peak_of(model):
    """The most bytes that were alive at once in a pass, beside the model; counted from outside."""
    with LiveMemory(without=model.parameters()) as memory:
        pass_of(model)
    return memory.peak


def test_the_experts_of_one_layer_are_on_the_device_at_once_forward_and_backward():
    model = vit()
    with trace_routing(model) as trace:
        pass_of(model)
    used = [OF_ONE * len(layer.experts.unique()) for layer in trace.layers.values()]
    plain = peak_of(model)

    with offload_experts(model) as offload:
        peak = peak_of(model)
    assert offload.peak_bytes == max(used)
    assert offload.held_bytes == 0
    # in the backward pass neither the first biases are read again, nor is anything copied twice
    biases = sum(used) * 4 * HIDDEN // OF_ONE
    assert offload.copied_bytes == 2 * sum(used) - biases
    assert peak <= plain + max(used)
    assert sum(used) > 1.5 * (plain + max(used))  # so these bounds say something


@pytest.mark.parametrize("options", [{"recompute": True}, {}])
def test_autograd_keeps_no_expert_until_the_backward_pass(options):
    torch.manual_seed(0)
    layer = MoE(DIM, HIDDEN, EXPERTS, **options)
    x = torch.randn(50, DIM, requires_grad=True)
    with offload_experts(layer) as offload:
        y = layer(x)
        assert offload.held_bytes == 0
        y.sum().backward()
        assert offload.held_bytes == 0


def test_autocast_keeps_no_expert_in_16_bits_either():
    model = vit()
    with offload_experts(model) as offload, torch.autocast("cpu", torch.bfloat16):
        pass_of(model)
    assert offload.peak_bytes <= OF_LAYER / 2
    assert offload.held_bytes == 0


def test_a_graph_of_second_order_holds_experts_until_it_is_freed():
    layer = MoE(DIM, HIDDEN, EXPERTS)
    x = torch.randn(50, DIM, requires_grad=True)
    with offload_experts(layer) as offload:
        (gradient,) = torch.autograd.grad(layer(x).sin().sum(), [x], create_graph=True)
        assert offload.held_bytes > 0
        del gradient
        assert offload.held_bytes == 0


def test_experts_without_tokens_are_not_copied():
    layer = MoE(DIM, HIDDEN, EXPERTS)
    x = torch.randn(50, DIM)
    with torch.no_grad(), offload_experts(layer) as offload:
        with intervene(layer, OneExpert(5)):
            layer(x)
        assert offload.copied_bytes == OF_ONE
        with intervene(layer, MaskExperts([0, 1, 2, 3, 4])):
            layer(x)
        assert offload.copied_bytes <= 4 * OF_ONE


def copied(layer, offload, expert):
    """How many experts come from host memory in a pass that uses this one."""
    before = offload.copied_bytes
    with torch.no_grad(), intervene(layer, OneExpert(expert)):
        layer(torch.ones(3, DIM))
    return (offload.copied_bytes - before) / OF_ONE


def test_the_experts_that_were_used_last_stay():
    layer = MoE(DIM, HIDDEN, EXPERTS)
    with offload_experts(layer, keep=2) as offload:
        assert [copied(layer, offload, e) for e in (0, 1, 0, 2, 0, 1, 2)] == [1, 1, 0, 1, 0, 1, 1]
        assert offload.held_bytes == 2 * OF_ONE


@pytest.mark.parametrize(("keep", "second"), [(0, EXPERTS), (3, EXPERTS - 3), (EXPERTS, 0)])
def test_a_pass_that_uses_all_experts_copies_those_that_did_not_stay(keep, second):
    layer = SoftMoE(DIM, HIDDEN, EXPERTS)
    x = torch.randn(2, 4, DIM)
    with torch.no_grad(), offload_experts(layer, keep=keep) as offload:
        counts = [offload.copied_bytes / OF_ONE for _ in range(3) if layer(x) is not None]
        assert counts == [EXPERTS, EXPERTS + second, EXPERTS + 2 * second]
        assert offload.held_bytes == keep * OF_ONE


def test_a_backward_pass_finds_experts_that_stayed():
    layer = MoE(DIM, HIDDEN, EXPERTS)
    x = torch.randn(50, DIM, requires_grad=True)
    with offload_experts(layer, keep=EXPERTS) as offload:
        layer(x).sum().backward()
        assert offload.copied_bytes == OF_LAYER
        assert offload.peak_bytes == OF_LAYER
    assert offload.held_bytes == 0


def test_weights_that_change_inside_the_block_are_read_again():
    layer, other = MoE(DIM, HIDDEN, EXPERTS).eval(), MoE(DIM, HIDDEN, EXPERTS).eval()
    x = torch.randn(50, DIM)
    with torch.no_grad(), offload_experts(layer, keep=EXPERTS):
        layer(x)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))


def test_weights_that_change_before_the_backward_pass_are_an_error():
    layer = MoE(DIM, HIDDEN, EXPERTS)
    x = torch.randn(50, DIM, requires_grad=True)
    with offload_experts(layer):
        y = layer(x)
        layer.fc1.weight.data.mul_(1)  # .data hides it from autograd
        y.sum().backward()
        y = layer(x)
        with torch.no_grad():
            layer.fc1.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified in place"):
            y.sum().backward()
