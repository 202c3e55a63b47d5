"""Bad input: the error names the argument, the value, and what is allowed."""

import pytest
import torch

from ironmoe.attacks import PGD

IMAGES, LABELS = torch.full((4, 3), 0.5), torch.tensor([0, 1, 2, 0])


def with_value(value):
    images = IMAGES.clone()
    images[2, 1] = value
    return images


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (
            with_value(1.5),
            LABELS,
            ValueError,
            r"images must lie in bounds = \(0.0, 1.0\), got values from 0.5 to 1.5, first in "
            r"example 2",
        ),
        (with_value(-0.1), LABELS, ValueError, "images must lie in bounds"),
        (with_value(float("nan")), LABELS, ValueError, "NaN or infinity first in example 2"),
        (with_value(float("inf")), LABELS, ValueError, "must be finite"),
        (IMAGES.to(torch.uint8), LABELS, TypeError, "images must be a floating point tensor"),
        (IMAGES.tolist(), LABELS, TypeError, "images must be a floating point tensor"),
        (IMAGES, LABELS.int(), TypeError, "labels must be an int64 tensor"),
        (IMAGES, LABELS.float(), TypeError, "labels must be an int64 tensor"),
        (IMAGES, LABELS[:3], TypeError, r"labels must be an int64 tensor \(4,\)"),
        (IMAGES, LABELS - 1, ValueError, "labels must be at least 0, got -1"),
        (IMAGES, LABELS + 1, ValueError, "labels must be below the model's 3 classes, got 3"),
    ],
)
def test_bad_inputs_are_named(images, labels, error, message):
    with pytest.raises(error, match=message):
        PGD(torch.nn.Linear(3, 3), 0.1)(images, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "eps must be finite and at least 0"),
        ({"eps": float("nan")}, "eps must be finite and at least 0"),
        ({"eps": torch.tensor([0.1, -0.1])}, "eps must be finite and at least 0"),
        ({"eps": torch.tensor([0.1, 0.1])}, "eps must be a number or have shape"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"norm": "L7"}, "norm must be one of .*got 'L7'"),
        ({"alpha": -1.0}, "alpha must be a number, at least 0"),
        ({"restarts": 0}, "restarts must be 1"),
        ({"restarts": 2, "random_start": False}, "restarts must be 1"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"bounds": (1, 0)}, "bounds must be"),
        ({"loss": lambda logits, labels: logits.sum()}, "loss must return one value an example"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        labels = torch.nn.Linear(3, 3)  # any model
        PGD(labels, **options)(IMAGES, labels(IMAGES).argmax(1))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda x: x * float("nan"), ValueError, "got NaN for 4 of 4 examples"),
        (lambda x: (x, x), TypeError, "model must return a float tensor of logits"),
        (lambda x: x[:, 0], TypeError, "model must return a float tensor of logits"),
        (
            lambda x: x.round().detach() + torch.tensor([1.0, 0, 0]),
            ValueError,
            "must be differentiable",
        ),
        ("no model", TypeError, "model must be callable"),
    ],
)
def test_bad_models_are_named(model, error, message):
    with pytest.raises(error, match=message):
        PGD(model, 0.1)(IMAGES, torch.zeros(4, dtype=torch.int64))


def test_indices_that_are_not_different_are_named():
    model = torch.nn.Linear(3, 3)
    with pytest.raises(
        ValueError, match="indices must differ from each other, got 2 different ones of 4"
    ):
        PGD(model, 0.1).run(IMAGES, LABELS, torch.tensor([0, 1, 1, 0]))
