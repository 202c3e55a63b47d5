"""The check of gradients against differences: rounded inputs trip it, smooth models do not,
whatever their units are."""

import math

import pytest
import torch
import toys
from torch import nn

from ironmoe.attacks import PGD, check_model

NAME = "quantised input"


@pytest.fixture(scope="module")
def data():
    return toys.blobs()


@pytest.fixture(scope="module", params=[torch.float32, torch.float64])
def model(request, data):
    return toys.mlp(*data).to(request.param)


def flag_of(model, images, labels, **options):
    attack = PGD(model, 0.06, **options)
    return next(flag for flag in check_model(attack, images, labels) if flag.name == NAME)


def like(model, images):
    return images.to(next(model.parameters()).dtype)


def straight_through(x, levels):
    return x + ((x * levels).round() / levels - x).detach()


BOUNDS = [(0, 1), (-1e6, 1e6), (-math.inf, math.inf)]


@pytest.mark.parametrize("bounds", BOUNDS)
def test_wide_bounds_are_no_rounding(model, data, bounds):
    """The noise has the size of what the images are, not of what they may be."""
    images = like(model, data[0])
    flag = flag_of(model, images, data[1], bounds=bounds)
    assert not flag.tripped and "Gradients describe the model" in flag.message
    for levels in (15, 255):
        rounded = lambda x, n=levels: model(straight_through(x, n))  # noqa: E731
        assert flag_of(rounded, images, data[1], bounds=bounds).tripped


def test_images_of_millions_are_no_rounding(model, data):
    images = 2e6 * like(model, data[0]) - 1e6

    def scaled(x):
        return model((x + 1e6) / 2e6)

    assert not flag_of(scaled, images, data[1], bounds=(-1e6, 1e6)).tripped

    def rounded(x):
        return model(straight_through((x + 1e6) / 2e6, 255))

    assert flag_of(rounded, images, data[1], bounds=(-1e6, 1e6)).tripped


def test_features_have_units_of_their_own(model, data):
    """A row of a table with ages beside incomes."""
    units = 10 ** torch.linspace(-3, 6, 144)
    rows = like(model, data[0].flatten(1) * units)

    def table(x):
        return model((x / like(model, units)).view(-1, 1, 12, 12))

    flag = flag_of(table, rows, data[1], bounds=(-1e7, 1e7))
    assert not flag.tripped and "Gradients describe the model" in flag.message


def test_one_row_far_away_is_no_rounding(model, data):
    """The gradient holds for noise of a smaller size."""
    images = like(model, data[0]).clone()
    images[0] = 1e4
    assert not flag_of(model, images, data[1], bounds=(-1e6, 1e6)).tripped


@pytest.mark.parametrize("sureness", [1, 3, 10, 100, 1000])
@pytest.mark.parametrize("squash", [torch.sigmoid, lambda z: z.softmax(1), torch.tanh])
def test_saturated_outputs_are_no_rounding(model, data, sureness, squash):
    images = like(model, data[0])
    assert not flag_of(lambda x: squash(sureness * model(x)), images, data[1]).tripped


@pytest.mark.parametrize("sureness", [1, 3])
def test_rounded_images_before_a_sigmoid_are_rounded(model, data, sureness):
    images = like(model, data[0])

    def rounded(x):
        return (sureness * model(straight_through(x, 31))).sigmoid()

    assert flag_of(rounded, images, data[1]).tripped


def test_outputs_of_half_precision_are_not_looked_at(model, data):
    images = like(model, data[0])
    for dtype in (torch.bfloat16, torch.float16):
        flag = flag_of(lambda x, dtype=dtype: model(x).to(dtype), images, data[1])
        assert not flag.tripped and "half precision" in flag.message


def test_gradients_that_are_not_the_models_own_are_seen(model, data):
    class OtherWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return -grad

    assert flag_of(lambda x: model(OtherWay.apply(x)), like(model, data[0]), data[1]).tripped


def test_steep_activations_are_no_rounding(data):
    """They bend within the first noise, and not within a smaller one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.Tanh(), nn.Linear(32, 4)).double()
    with torch.no_grad():
        net[1].weight.mul_(200)
    flag = flag_of(net, data[0].double(), net(data[0].double()).argmax(1))
    assert not flag.tripped


@pytest.mark.parametrize("levels", [3, 7, 31, 255])
def test_large_images_that_are_rounded_without_a_gradient(levels):
    """Some of their many pixels go over an edge however small the noise is."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 7, 4), nn.GELU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(72, 10))
    images = torch.rand(16, 3, 64, 64)
    labels = net(images).argmax(1)

    def rounded(x):
        return net((x * levels).round() / levels)

    assert flag_of(rounded, images, labels).tripped
    assert flag_of(rounded, (images * levels).round() / levels, labels).tripped
    assert flag_of(lambda x: net(straight_through(x, levels)), images, labels).tripped
    assert not flag_of(lambda x: net(x.detach()) + 0 * x.sum(), images, labels).tripped
    assert not flag_of(net, images, labels).tripped
