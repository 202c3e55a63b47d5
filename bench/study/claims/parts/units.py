"""In which units outcomes are compared, and which differences are large enough to matter."""

from collections.abc import Callable
from math import atanh, expm1, isfinite, log, log1p, nan, tanh
from typing import NamedTuple

CLOSEST_TO_ONE = 1 - 1e-6  # of a correlation, whose Fisher transform would be infinite


class Unit(NamedTuple):
    """How differences of one kind of outcome are computed and printed.

    name: behind a printed number; digits: of it, behind the point; smallest: the smallest effect of
    interest on the scale on which runs are compared; smallest_text: the same for people;
    none_text: what there is where no effect as large is left; scale:
    from a measured value to that scale, NaN where it has no place there; shown: from a mean on that
    scale to what is printed.
    """

    name: str
    digits: int
    smallest: float
    smallest_text: str
    none_text: str
    scale: Callable[[float], float]
    shown: Callable[[float], float]


def _percent(share: float) -> float:
    return 100 * share


def _logarithm(value: float) -> float:
    return log(value) if value > 0 and isfinite(value) else nan


def _as_ratio(difference: float) -> float:
    return 100 * expm1(difference)


def _fisher(rho: float) -> float:
    return atanh(max(-CLOSEST_TO_ONE, min(CLOSEST_TO_ONE, rho)))


def _same(value: float) -> float:
    return value


POINTS = Unit("points", 1, 2.0, "2 points", "no difference of more than 2 points", _percent, _same)
"""Shares such as accuracies, in percentage points."""

RATIO = Unit("%", 1, log1p(0.05), "5 %", "no difference of more than 5 %", _logarithm, _as_ratio)
"""Positive outcomes without a natural scale, such as radii: runs are compared by their logarithms,
so that a seed which makes all models twice as smooth leaves the ratio as it is."""

CORRELATION = Unit(
    "",
    2,
    atanh(0.1),
    "a rank correlation of 0.1",
    "no rank correlation of more than 0.1",
    _fisher,
    tanh,
)
"""Correlations, averaged after Fisher's transform. 0.1 is what Cohen (1988) calls small."""
