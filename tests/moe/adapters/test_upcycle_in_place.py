"""What lies around an MLP computes the same with experts in its place, or is named."""

import copy

import pytest
import torch
from torch import nn

from ironmoe.moe import MoE, upcycle

DIM, HIDDEN = 12, 16


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class ByCount(Mlp):
    def forward(self, x):
        y = super().forward(x)
        return y if x.shape[1] < 5 else y + 1


class OfOneToken(Mlp):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if x.shape[1] == 1 else y


class Clamped(Mlp):
    def forward(self, x):
        return super().forward(x.clamp(-6, 6))


class Block(nn.Module):
    def __init__(self, mlp=Mlp):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(DIM), mlp()

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Twice(Block):
    """It takes the hidden values from the layers of its MLP."""

    def forward(self, x):
        return super().forward(x) + self.mlp.fc1(x).mean()


class Weighed(Block):
    def forward(self, x):
        return super().forward(x) + self.mlp.fc2.weight.square().mean()


class Listed(Block):
    """Its output is no tensor."""

    def forward(self, x):
        y = super().forward(x)
        return {"y": y, "more": [y, self.mlp.fc1.weight.sum()]}


class Image(nn.Module):
    """The structure of a ConvNeXt block."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.pwconv1, self.act = nn.Linear(DIM, HIDDEN), nn.GELU()
        self.pwconv2 = nn.Linear(HIDDEN, DIM)

    def layers(self, x):
        h = self.pwconv1(self.norm(x.permute(0, 2, 3, 1)))
        return h, self.pwconv2(self.act(h)).permute(0, 3, 1, 2)

    def forward(self, x):
        return x + self.layers(x)[1]


class HiddenImage(Image):
    def forward(self, x):
        h, y = self.layers(x)
        return x + y + h.mean()


class RandomBlock(Block):
    """Another one each time, in eval mode, too."""

    def forward(self, x):
        return super().forward(x) + torch.randn(())


class TwoInputs(Block):
    def forward(self, x, size):
        height, width = size
        return super().forward(x) * (height + width)


def model_of(block):
    torch.manual_seed(0)
    return nn.Sequential(block(), block()).eval()


ALONE = r"must be used by its block, {}, for what the MLP returns alone, because experts take"
REFUSED = {
    "hidden value of an image": (HiddenImage, r"^0 \(HiddenImage\) " + ALONE + ".*something else"),
    "hidden value": (Twice, r"^0\.mlp \(Mlp\) " + ALONE + ".* fails with them: .*fc1"),
    "weight": (Weighed, ALONE + ".* fails with them: .*fc2"),
    "output that is no tensor": (Listed, ALONE + ".* fails with them: .*fc1"),
    "number of tokens": (lambda: Block(ByCount), "something else for a number of tokens of 50"),
    "one token": (lambda: Block(OfOneToken), "something else for a number of tokens of 1 and"),
    "large values": (lambda: Block(Clamped), "of 50 and a standard deviation of 10"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_block_that_experts_would_change_is_named_and_stays(case):
    block, message = REFUSED[case]
    model = model_of(block)
    modules = [(each, dict(vars(each)), dict(each._modules)) for each in model.modules()]
    with pytest.raises(ValueError, match=message.format(getattr(block, "__name__", ""))):
        upcycle(model, 4)
    for each, attributes, children in modules:
        assert vars(each) == attributes and each._modules == children


@pytest.mark.parametrize("block", [Block, Image, RandomBlock, TwoInputs])
def test_a_block_that_can_have_experts_or_cannot_be_tried_gets_them(block):
    upcycled = upcycle(model_of(block).train(), 4)
    assert sum(isinstance(each, MoE) for each in upcycled.modules()) == 2
    assert all(each.training for each in upcycled.modules())


def test_the_trial_takes_no_random_numbers_from_the_router():
    weights = [upcycle(model_of(block), 4)[1].mlp.router.weight for block in (Block, RandomBlock)]
    assert torch.equal(*weights)


def test_torchs_fused_path_takes_another_gelu_than_the_layer_and_experts_that_of_the_layer():
    """docs/adapters.md says so. GELU and its tanh form differ by up to 5e-4, rounding is 1e-6."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 2, HIDDEN, 0.0, nn.GELU("tanh"), batch_first=True)
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(4, 9, DIM)
    of_layer = dense(x).detach()  # with gradients torch leaves its fused path
    ours = upcycle(copy.deepcopy(dense), 4)
    torch.testing.assert_close(ours(x).detach(), of_layer, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), of_layer, rtol=0, atol=1e-5)
