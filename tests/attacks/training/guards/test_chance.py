"""Accuracy against that of the same answers in random order."""

from itertools import permutations
from statistics import fmean, pstdev

import pytest
import torch

from ironmoe.attacks.training.guards.chance import Z, against_chance


@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        ((0, 0, 1, 2, 1, 0, 0), (0, 1, 1, 2, 2, 0, 2)),
        ((0, 0, 0, 1), (0, 0, 1, 1)),
        ((3, 3, 3, 3), (0, 1, 2, 2)),
        ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)),
    ],
)
def test_chance_is_what_all_orders_of_the_answers_say(answers, labels):
    def accuracy(order):
        return fmean(a == b for a, b in zip(order, labels, strict=True))

    shares = [accuracy(order) for order in permutations(answers)]
    found = against_chance(torch.tensor(answers), torch.tensor(labels))
    assert found.share == pytest.approx(fmean(shares))
    assert found.learned == (accuracy(answers) - fmean(shares) > Z * pstdev(shares))


def test_one_class_for_every_image_is_no_learning_however_common_it_is():
    labels = (torch.arange(200) >= 190).long()
    assert against_chance(torch.zeros_like(labels), labels) == (0.95, False)
    assert against_chance(labels, labels).learned
    nearly = torch.zeros_like(labels)
    nearly[5] = 1  # and wrong
    assert not against_chance(nearly, labels).learned


def test_images_of_one_class_cannot_tell():
    labels = torch.zeros(10, dtype=torch.int64)
    assert against_chance(labels, labels) == (1.0, True)
    assert against_chance(labels[:1], labels[:1]).learned
