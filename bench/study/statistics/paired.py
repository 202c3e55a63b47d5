"""Numbers of which each belongs to one seed: differences of two arms, slopes, correlations."""

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

from ironmoe.bench.common.statistics import spread, t_half_width
from ironmoe.bench.study.statistics.sign_flips import sign_flips
from ironmoe.bench.study.statistics.student import p_two_sided

CONFIDENCE = 0.95


class Paired(NamedTuple):
    """A mean over seeds.

    mean, sd: sd with n − 1; low, high: the 95 % t interval; p: of the two-sided t test against 0;
    p_flips: of the sign-flip test; least_p_flips: how small p_flips can be with that many seeds;
    runs: how many seeds. With one seed sd, low, high and p are NaN.
    """

    mean: float
    sd: float
    low: float
    high: float
    p: float
    p_flips: float
    least_p_flips: float
    runs: int


def paired(differences: Sequence[float]) -> Paired:
    """The mean of numbers of which each belongs to one seed, tested against 0.

    The t test takes them to be normal. It is the one that counts, because the sign-flip test, which
    takes nothing to be normal, cannot reach 5 % with fewer than 6 seeds.

    Args:
        differences: one a seed, at least one.

    Raises:
        ValueError: none.
    """
    mean, sd, runs = spread(differences)
    half = t_half_width(sd, runs, CONFIDENCE)
    flips = sign_flips(differences)
    p = p_two_sided(mean, sd, runs) if runs > 1 else nan
    return Paired(mean, sd, mean - half, mean + half, p, flips.p, flips.least, runs)
