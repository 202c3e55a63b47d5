"""What several trainings say together. The unit is the training run, never the image: the same
recipe with another seed gives another model, and a claim about a method is about all of them."""

from collections.abc import Sequence
from math import nan
from statistics import fmean, stdev
from typing import NamedTuple

from scipy import special


class Spread(NamedTuple):
    """mean and sd: over runs, sd with n − 1 and NaN for one run; runs: how many."""

    mean: float
    sd: float
    runs: int


class Difference(NamedTuple):
    """The mean of paired differences, and the two ends of its t interval (NaN for one pair)."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def decided(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation over runs. ValueError: no run."""
    if not values:
        raise ValueError("values must be at least one, got none")
    return Spread(fmean(values), stdev(values) if len(values) > 1 else nan, len(values))


def t_half_width(sd: float, runs: int, confidence: float = 0.95) -> float:
    """How far Student's t interval of a mean reaches to each side; NaN for one run.

    Args:
        sd: of the runs, with n − 1.
        confidence: that of the interval.

    Raises:
        ValueError: ``confidence`` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if runs < 2:
        return nan
    return float(special.stdtrit(runs - 1, 0.5 + confidence / 2)) * sd / runs**0.5


def paired_difference(
    values: Sequence[float], others: Sequence[float], confidence: float = 0.95
) -> Difference:
    """``values`` − ``others``, pair by pair, with Student's t interval (scipy) over the pairs.

    Args:
        values, others: of the same seeds, in the same order.

    Raises:
        ValueError: they are not equally many, or none, or ``confidence`` is not between 0 and 1.
    """
    if len(values) != len(others):
        raise ValueError(
            f"values and others must be equally many, got {len(values)} and {len(others)}"
        )
    mean, sd, pairs = spread([one - other for one, other in zip(values, others, strict=True)])
    half = t_half_width(sd, pairs, confidence)
    return Difference(mean, mean - half, mean + half, pairs)
