"""Intervals for figures, over seeds and images at once."""

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def pigeonhole(
    values_SN: Sequence[Sequence[float]] | NDArray[np.float64],
    *,
    draws: int = 2_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """The mean over seeds and images, with the percentile interval of the pigeonhole bootstrap
    (Owen 2007, Ann. Appl. Stat. 1, 386–411): seeds and images are both drawn anew, independently.

    For figures. With three seeds the interval is too narrow, so a test stands on the t interval.

    Args:
        values_SN: S seeds × N images, such as paired differences of two arms.
        draws, seed: of the bootstrap.
        confidence: that of the interval.

    Returns:
        NaN ends for one seed: nothing is known of another.

    Raises:
        ValueError: no seed, no image, rows of several lengths, or another confidence.
    """
    lengths = {len(row) for row in values_SN}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"values_SN must have rows of one length, at least 1, got lengths {sorted(lengths)}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")

    values = np.asarray(values_SN, np.float64)
    seeds, images = values.shape
    mean = float(values.mean())
    if seeds == 1:
        return Interval(mean, nan, nan)

    rng = np.random.default_rng(seed)
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    image_counts = rng.multinomial(images, np.full(images, 1 / images), size=draws)
    means = ((seed_counts @ values) * image_counts).sum(1) / (seeds * images)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(mean, float(low), float(high))
