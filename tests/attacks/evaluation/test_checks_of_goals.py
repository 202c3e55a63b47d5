"""The look at a model, whatever the goal of the attacks is."""

import pytest
import torch
import toys
from torch import nn

from ironmoe.attacks import (
    PGD,
    EmbeddingDistance,
    MultiLabel,
    Regression,
    Segmentation,
    TopK,
    check_model,
)

IMAGES, LABELS = toys.blobs(40)


@pytest.fixture(scope="module")
def network():
    return toys.mlp(IMAGES, LABELS).float()


def pixels(x):
    return torch.stack([8 * x[:, 0] - 4, torch.zeros_like(x[:, 0])], 1)


TASKS = {
    "top-k": (lambda net: net, lambda net: LABELS, TopK(2)),
    "multi-label": (lambda net: net, lambda net: nn.functional.one_hot(LABELS, 4), MultiLabel()),
    "segmentation": (
        lambda net: pixels,
        lambda net: (IMAGES[:, 0] < 0.5).long(),
        Segmentation(share=0.5),
    ),
    "regression": (
        lambda net: lambda x: net(x)[:, 0],
        lambda net: net(IMAGES)[:, 0].detach(),
        Regression(tolerance=0.5),
    ),
    "embedding": (lambda net: net, lambda net: net(IMAGES).detach(), EmbeddingDistance(0.1)),
}


def flags_of(task, network, around=lambda model: model):
    make, labels, goal = TASKS[task]
    attack = PGD(around(make(network)), 0.05, goal=goal)
    return {flag.name: flag for flag in check_model(attack, IMAGES, labels(network))}


@pytest.mark.parametrize("task", TASKS)
def test_an_honest_model_trips_none(network, task):
    """Also where the loss has its minimum at the image, as the distance to what it is."""
    flags = flags_of(task, network)
    assert not any(flag.tripped for flag in flags.values())
    assert "Gradients describe the model" in flags["quantised input"].message


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_rounds_is_found(network, task):
    def straight(model):
        return lambda x: model(x + ((31 * x).round() / 31 - x).detach())

    def flat(model):
        return lambda x: model((31 * x).round() / 31)

    assert flags_of(task, network, straight)["quantised input"].tripped
    flags = flags_of(task, network, flat)
    assert flags["quantised input"].tripped and flags["zero gradients"].value == 1


@pytest.mark.parametrize("task", TASKS)
def test_random_and_coupled_models_are_found(network, task):
    def noisy(model):
        return lambda x: model(x + 0.05 * torch.rand_like(x))

    def coupled(model):
        return lambda x: model(x - 0.3 * x.mean(0, keepdim=True))

    assert flags_of(task, network, noisy)["randomised model"].tripped
    assert flags_of(task, network, coupled)["batch dependence"].tripped


@pytest.mark.parametrize("task", TASKS)
def test_a_model_without_a_gradient_says_so(network, task):
    flags = flags_of(task, network, lambda model: lambda x: model(x).detach())
    assert not any(flag.tripped for flag in flags.values())
    assert "its outputs have no graph" in flags["zero gradients"].message
