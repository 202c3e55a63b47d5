"""Whether an outcome grows or falls along a ladder of arms, such as with log₂ E."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ironmoe.bench.study.statistics.permutation import Permutation, permutation_test


class Trend(NamedTuple):
    """slopes: one a seed, by least squares, in units of the outcome by unit of x; permutation: the
    test of their sum, in which the arms of a seed change places."""

    slopes: tuple[float, ...]
    permutation: Permutation


def trend(
    values_SA: Sequence[Sequence[float]],
    x_A: Sequence[float],
    *,
    draws: int = 9_999,
    seed: int = 0,
) -> Trend:
    """The slope of an outcome in x, with runs as points and seeds as blocks.

    The runs of one seed share batches and images, so arms change places within a seed only. Page's
    L is this test on ranks within a seed, and Jonckheere and Terpstra's, which mixes all runs,
    would take them as independent; ranks say that there is a trend and not how large it is, so the
    slope is permuted here. The permutation test assumes that all arms scatter alike. Where they do
    not, a t test of ``slopes`` over seeds is right.

    Args:
        values_SA: S seeds × A arms, all measured.
        x_A: where the arms stand, such as log₂ of their experts; not all equal.
        draws, seed: of permutations, where there are too many to try them all.

    Raises:
        ValueError: no seed, rows that do not fit ``x_A``, or all of ``x_A`` equal.
    """
    x = np.asarray(x_A, np.float64)
    if not len(values_SA) or any(len(row) != len(x) for row in values_SA):
        lengths = [len(row) for row in values_SA]
        raise ValueError(f"values_SA must have rows of {len(x)} numbers, got {lengths}")
    if len(x) < 2 or np.ptp(x) == 0:
        raise ValueError(f"x_A must be at least two different numbers, got {list(x_A)}")

    centred = x - x.mean()
    slopes = np.asarray(values_SA, np.float64) @ centred / (centred @ centred)
    blocks = [(centred, row) for row in values_SA]
    return Trend(tuple(slopes.tolist()), permutation_test(blocks, draws=draws, seed=seed))
