"""Checks of models that rule classes out: huge logits, and those of −∞, hide nothing."""

import math

import pytest
import torch
import toys

from ironmoe.attacks import PGD, check_model
from ironmoe.attacks.evaluation.checks.distances import apart

MASKS = [-math.inf, torch.finfo(torch.float32).min, -1e30, -1e9, -1e6, -65504.0, -1e4, -1e3]


@pytest.fixture(scope="module")
def data():
    return toys.blobs()


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(*data).float()


def masked(model, mask, more=6):
    """The model with classes added that cannot be."""
    return lambda x: torch.nn.functional.pad(model(x), (0, more), value=mask)


def tripped(model, data):
    return {flag.name for flag in check_model(PGD(model, 0.06), *data) if flag.tripped}


@pytest.mark.parametrize("mask", MASKS)
def test_a_deterministic_model_trips_none(model, data, mask):
    assert tripped(masked(model, mask), data) == set()


@pytest.mark.parametrize("mask", MASKS)
def test_a_random_model_is_found(model, data, mask):
    noisy = masked(lambda x: model(x) + 0.05 * torch.randn(len(x), 4), mask)
    assert "randomised model" in tripped(noisy, data)


@pytest.mark.parametrize("mask", MASKS)
def test_batch_dependence_is_found(model, data, mask):
    coupled = masked(lambda x: model(x - x.mean(0, keepdim=True)), mask)
    assert "batch dependence" in tripped(coupled, data)


def test_classes_that_are_ruled_out_by_chance_are_a_random_answer(model, data):
    def some(x):
        return model(x).masked_fill(torch.rand(len(x), 4) < 0.1, -math.inf)

    assert "randomised model" in tripped(some, data)


def test_distances_are_in_units_of_the_norm_of_what_can_move():
    logits = torch.tensor([[3.0, 4, -math.inf, -1e9], [3, 4, 0, 0], [0, 0, 0, 0]])
    other = torch.tensor([[3.0, 4.5, -1e9, -math.inf], [3, 4.5, 0, 0], [0, 0, 0, 0]])
    assert apart(logits, other).tolist() == pytest.approx([0.1, 0.1, 0])
    lost = torch.tensor([[3.0, 4, 2, -1e9]])
    assert float(apart(logits[:1], lost)) > 0.9 and float(apart(lost, logits[:1])) > 0.9
