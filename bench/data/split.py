"""The test split of a set: the same on every machine and for every seed."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ironmoe.attacks.data import DataError

TEST_SHARE = 0.2


def stratified(labels: Tensor, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(train, test) places of a set with these labels (N,): a fifth of each class is for testing.
    Both are in a random order that never changes, so that the first n are a sample of all classes.

    Raises:
        DataError: a class has one image alone.
    """
    generator = np.random.default_rng(0)
    train, test = [], []
    for label, name in enumerate(classes):
        rows = np.flatnonzero(labels.numpy() == label)
        if len(rows) == 0:  # a label that no image has
            continue
        if len(rows) < 2:
            raise DataError(
                f"class {name!r} must have at least 2 images, one to train and one to test, "
                f"got {len(rows)}"
            )
        rows = generator.permutation(rows)
        count = min(len(rows) - 1, max(1, round(TEST_SHARE * len(rows))))
        test.append(rows[:count])
        train.append(rows[count:])

    return _shuffled(train, generator), _shuffled(test, generator)


def sample(count: int, most: int) -> Tensor:
    """(n,) int64, ascending: of ``count`` places at most ``most``, drawn by random numbers that
    never change. In a folder, the first ones would all be of one class."""
    if count <= most:
        return torch.arange(count)
    drawn = np.random.default_rng(0).permutation(count)[:most]
    return torch.from_numpy(np.sort(drawn))


def _shuffled(rows_by_class: list[np.ndarray], generator: np.random.Generator) -> Tensor:
    return torch.from_numpy(generator.permutation(np.concatenate(rows_by_class)))
