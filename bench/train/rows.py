"""Which images are trained on, and which choose the weights. Test images do neither."""

from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.data import DataError
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.train.recipe import TrainRecipe

HELD_OUT = 0.1  # of the training images
MOST_HELD_OUT = 400  # unless there are more classes
MOST_ATTACKED = 200  # of them after every epoch


class Split(NamedTuple):
    """Rows of the data: those that are trained on, (N,), and those that choose the weights, (H,).

    Rice et al. (arXiv 2002.11569): weights chosen by test images look more robust than they are.
    """

    trained: Tensor
    held_out: Tensor


def checked_split(data: ImageData, recipe: TrainRecipe, processes: int) -> Split:
    """``split``, if it suits the batches of the recipe and the processes.

    Raises:
        DataError, UserError: it does not, or the data cannot be split.
    """
    rows = split(data)
    if recipe.batch_size > len(rows.trained):
        raise UserError(
            f"data {data.name!r} must have at least {recipe.batch_size} images to train on, as "
            f"many as a batch, got {len(rows.trained)}; ironmoe train takes a smaller --batch-size"
        )
    if recipe.parts % processes:
        raise UserError(
            f"--parts must be a multiple of the number of processes, {processes}, got "
            f"{recipe.parts}"
        )
    return rows


def split(data: ImageData) -> Split:
    """Hold out a tenth of the training images of every class, the same ones for every seed.

    Of many images it is less than a tenth: about MOST_HELD_OUT in all, and at least one of a class.
    A class with one training image keeps it for training. Of the held-out images, at most
    MOST_ATTACKED are used.

    Raises:
        DataError: there are fewer than two classes, or nothing to hold out.
    """
    if len(data.classes) < 2:
        raise DataError(
            f"data {data.name!r} must have at least 2 classes to train on, got {data.classes}"
        )

    rows, _ = data.split()  # in a random order that never changes
    labels = data.labels[rows]
    share = min(HELD_OUT, MOST_HELD_OUT / len(rows))
    held_out = torch.zeros(len(rows), dtype=torch.bool)
    for label in labels.unique():
        (of_class,) = (labels == label).nonzero(as_tuple=True)
        count = min(len(of_class) - 1, max(1, round(share * len(of_class))))
        held_out[of_class[:count]] = True

    if not held_out.any():
        raise DataError(
            f"data {data.name!r} must have a class with at least 2 training images, one of which "
            "is held out, got none"
        )
    return Split(rows[~held_out], rows[held_out][:MOST_ATTACKED])
