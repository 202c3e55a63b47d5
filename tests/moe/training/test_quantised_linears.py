"""Vision transformers whose dense layers other libraries have quantised; experts stay as they
are."""

import pytest
import torch
from torch import nn

from ironmoe.attacks import PGD
from ironmoe.moe import MoE, VMoE


def vit():
    torch.manual_seed(0)
    make_moe = lambda: MoE(32, 64, 4, 4, shared_dim=32, shared_gate=True)  # noqa: E731
    net = VMoE(8, 4, 32, 2, 2, 64, 3, "last 1", channels=1, make_moe=make_moe).eval()
    nn.init.normal_(net.head.weight)
    return net


class EightBit(nn.Linear):
    """What bitsandbytes puts in the place of an nn.Linear: numbers of another dtype, and a forward
    that turns them back."""

    @classmethod
    def of(cls, linear):
        own = cls(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        numbers = (linear.weight.detach() / scale).round().to(torch.int8)
        own.weight = nn.Parameter(numbers, requires_grad=False)
        own.bias = linear.bias
        own.register_buffer("weight_scale", scale)
        return own

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.weight_scale, self.bias)


def by_bitsandbytes(net):
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, own_name = name.rpartition(".")
            setattr(net.get_submodule(parent), own_name, EightBit.of(module))


def by_torchao(net):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("quantise", [by_torchao, by_bitsandbytes])
def test_a_model_with_quantised_linear_layers_runs_and_can_be_attacked(quantise):
    net, images = vit(), torch.rand(4, 1, 8, 8)
    exact = net(images)
    experts = net.blocks[1].mlp.fc1.weight.clone()
    quantise(net)
    got = net(images)
    assert not got.equal(exact)
    # K = E: a small error cannot send a token to another expert
    assert (got - exact).norm() < 0.1 * exact.norm()
    assert net.blocks[1].mlp.fc1.weight.equal(experts)
    assert PGD(net, 0.1, steps=2)(images, got.argmax(1)).sub(images).abs().max() > 0.05
