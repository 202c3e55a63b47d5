"""Whatever a model returns and computes in: logits in float32, and gradients to the pixels."""

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ironmoe.bench.models.classifier import Classifier, as_it_is
from ironmoe.bench.models.outputs import logits_of
from ironmoe.moe import CheckpointError

LOGITS = torch.arange(6.0).view(2, 3)
FEATURES, COUNTS = torch.zeros(2, 4, 5), torch.zeros(2, 7, dtype=torch.int64)


@dataclass
class Named:
    logits: Tensor
    other: Tensor


@dataclass
class Unnamed:
    loss: None
    scores: Tensor


class Pair(NamedTuple):
    aux: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, FEATURES),
        [FEATURES, COUNTS, LOGITS, LOGITS + 1],
        {"logits": LOGITS, "other": LOGITS + 1},
        OrderedDict(features=FEATURES, counts=COUNTS, out=LOGITS),
        Named(LOGITS, LOGITS + 1),
        Unnamed(None, LOGITS),
        Pair(LOGITS + 1, LOGITS),
    ],
    ids=lambda output: type(output).__name__,
)
def test_logits_are_found_in_the_output(output):
    assert logits_of(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "there"),
    [
        ((FEATURES, COUNTS), "tuple with 0: float32 (2, 4, 5); 1: int64 (2, 7)"),
        ({"a": LOGITS, "b": LOGITS}, "dict with a: float32 (2, 3); b: float32 (2, 3)"),
        ({"loss": None}, "dict with loss: NoneType"),
        ((), "tuple with nothing"),
        (None, "NoneType with nothing"),
        ("text", "str with nothing"),
    ],
)
def test_an_output_without_logits_is_refused_with_what_it_has(output, there):
    with pytest.raises(CheckpointError, match=re.escape(f"got {there}")):
        logits_of(output)


class Linear(nn.Module):
    """Looks at the dtype that it gets."""

    def __init__(self, dtype):
        super().__init__()
        self.head = nn.Linear(3, 2, dtype=dtype)
        self.got = None

    def forward(self, images):
        self.got = images.dtype
        return {"logits": self.head(images.mean((2, 3)))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wrap", [Classifier, as_it_is])
def test_weights_of_another_dtype_get_images_in_it(dtype, wrap):
    model = wrap(Linear(dtype))
    pixels = torch.rand(4, 3, 5, 5, requires_grad=True)
    logits = model(pixels)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), pixels)
    assert model.model.got == dtype and logits.dtype == gradient.dtype == torch.float32
    expected = pixels.mean((2, 3)) @ model.model.head.weight.float().T
    expected = expected + model.model.head.bias.float()
    bound = 8 * torch.finfo(dtype).eps  # of sums of 3 products of numbers below 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=max(bound, 1e-6))


def test_what_a_cpu_cannot_do_in_float16_says_what_to_do():
    class Lacking(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float16))

        def forward(self, images):
            raise RuntimeError("\"some_kernel\" not implemented for 'Half'")

    with pytest.raises(CheckpointError, match=r"add dtype=float32 to the model's name"):
        Classifier(Lacking())(torch.rand(1, 3, 4, 4))


def test_a_model_without_weights_works():
    class Means(nn.Module):
        def forward(self, images):
            return images.mean((2, 3)), images

    pixels = torch.rand(2, 3, 4, 4)
    assert torch.equal(as_it_is(Means())(pixels), pixels.mean((2, 3)))
    assert torch.equal(Classifier(Means())(pixels), pixels.mean((2, 3)))


class Inside(nn.Module):
    """Weights in float32, or none, and logits in bfloat16."""

    def __init__(self, autocast):
        super().__init__()
        self.autocast = autocast
        self.head = nn.Linear(3, 2) if autocast else None
        self.register_buffer("weight", torch.rand(3, 2).bfloat16())

    def forward(self, images):
        means = images.mean((2, 3))
        if not self.autocast:
            return means.bfloat16() @ self.weight
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(means)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("wrap", [Classifier, as_it_is])
def test_logits_are_float32_whatever_the_model_computes_in(autocast, wrap):
    inner = Inside(autocast)
    pixels = torch.rand(4, 3, 5, 5, requires_grad=True)
    expected = inner(pixels)
    logits = wrap(inner)(pixels)
    assert expected.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, expected.float())
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), pixels)
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


def test_normalization_is_of_the_pixels_channels_and_before_their_order():
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    model = Classifier(nn.AdaptiveAvgPool2d(1), mean, std, order=(2, 1, 0))
    shift, scale = (torch.tensor(each).view(3, 1, 1) for each in (mean, std))
    expected = ((pixels - shift) / scale).flip(1).mean((2, 3), keepdim=True)
    torch.testing.assert_close(model(pixels.float()).double(), expected, rtol=1e-5, atol=1e-6)


def test_one_channel_is_not_taken_for_three():
    model = Classifier(nn.Flatten(), [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    with pytest.raises(CheckpointError, match="must get images with 3 channels, got 1"):
        model(torch.rand(2, 1, 4, 4))


def test_a_model_as_it_is_keeps_the_names_of_its_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    names = list(model.state_dict())
    assert as_it_is(model) is model and list(model.state_dict()) == names
