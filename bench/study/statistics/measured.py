"""What was measured of one training run."""

from typing import NamedTuple


class Measured(NamedTuple):
    """One model.

    arm: the name of its architecture; training: how it was trained, such as "standard"; seed: what
    pairs it with the other arms.

    values: one number each, such as "clean": 0.95. Accuracies and their means are shares between 0
    and 1. What was not measured is absent or NaN.

    images: one number each of the first images, such as "auc": [0.5, …]. The images and their order
    are the same in every run, and how many there are depends on the name alone; NaN where an image
    has no such number.
    """

    arm: str
    training: str
    seed: int
    values: dict[str, float]
    images: dict[str, list[float]]
