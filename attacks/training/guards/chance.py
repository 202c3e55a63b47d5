"""Whether a model has learned anything. One that gives every image the same class is right on all
images of this class, under any attack, too, and so looks robust."""

from typing import NamedTuple

import torch
from torch import Tensor

Z = 1.96  # standard deviations; chance is further above its mean in about 2.5 % of cases


class Chance(NamedTuple):
    """share: the accuracy, in [0, 1], that the same answers have in random order; learned: whether
    they are right more often, by more than chance. Images of one class alone cannot tell; there it
    is True."""

    share: float
    learned: bool


def against_chance(answers: Tensor, labels: Tensor) -> Chance:
    """Compare answers (N,) int64 with labels (N,) int64, both from 0; N ≥ 1.

    Mean and variance are those of the accuracy over all orders of the answers (Hoeffding 1951, A
    combinatorial central limit theorem).
    """
    total = len(labels)
    if bool((labels == labels[0]).all()):
        return Chance(float((answers == labels).double().mean()), True)
    classes = 1 + int(torch.cat([answers, labels]).max())
    given, wanted = (
        each.bincount(minlength=classes).double() / total for each in (answers, labels)
    )
    mean = float((given * wanted).sum())

    # how far a match of each pair of classes is from what its row and column have anyway
    match = torch.eye(classes, dtype=torch.float64, device=labels.device)
    rest = match - given[:, None] - wanted[None, :] + mean
    variance = float((wanted[:, None] * given[None, :] * rest.square()).sum()) / max(total - 1, 1)
    right = float((answers == labels).double().mean())
    return Chance(mean, right - mean > Z * variance**0.5)
