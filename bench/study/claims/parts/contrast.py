"""One comparison with one number a seed, and its tests."""

from math import nan
from typing import NamedTuple

from ironmoe.bench.study.claims.parts.units import Unit
from ironmoe.bench.study.claims.parts.verdict import Effect, Role
from ironmoe.bench.study.statistics.equivalence import beyond, tost
from ironmoe.bench.study.statistics.paired import Paired, paired
from ironmoe.bench.study.statistics.permutation import Permutation

PAIRED_T, PERMUTATION = "paired t", "permutation"
REACHED = 0.01  # 5 % in the first of Holm's steps over five claims


class Contrast(NamedTuple):
    """label: for tables; role: see ``Effect``; by_seed: at least one number, on the scale of
    ``unit``; setting: where a claim has several primary contrasts, what tells this one in a
    sentence; permutation: a test that takes the place of the t test where it can reach 1 %."""

    label: str
    role: Role
    unit: Unit
    by_seed: dict[int, float]
    setting: str = ""
    permutation: Permutation | None = None


class Tested(NamedTuple):
    """paired: the mean and its interval, on the unit's scale; p: two-sided, against 0; p_equivalent
    and p_beyond: against what lies beyond the smallest effect of interest, and within. NaN for one
    seed."""

    contrast: Contrast
    paired: Paired
    p: float
    test: str
    p_equivalent: float
    p_beyond: float


def tested(contrast: Contrast) -> Tested:
    """Every test of a contrast."""
    found = paired(list(contrast.by_seed.values()))
    p, test = found.p, PAIRED_T
    if contrast.permutation is not None and contrast.permutation.least <= REACHED:
        p, test = contrast.permutation.p, PERMUTATION
    if found.runs < 2:
        return Tested(contrast, found, nan, test, nan, nan)

    numbers, margin = (found.mean, found.sd, found.runs), contrast.unit.smallest
    equivalent, outside = tost(*numbers, margin=margin), beyond(*numbers, margin=margin)
    return Tested(contrast, found, p, test, equivalent, outside)


def effect_of(test: Tested, p_holm: float = nan) -> Effect:
    """What a table prints of it."""
    contrast, found = test.contrast, test.paired
    shown = contrast.unit.shown
    return Effect(
        label=contrast.label,
        role=contrast.role,
        unit=contrast.unit.name,
        smallest_text=contrast.unit.smallest_text,
        mean=shown(found.mean),
        low=shown(found.low),
        high=shown(found.high),
        runs=found.runs,
        by_seed={seed: shown(value) for seed, value in contrast.by_seed.items()},
        p=test.p,
        test=test.test,
        p_flips=found.p_flips,
        least_p_flips=found.least_p_flips,
        p_equivalent=test.p_equivalent,
        p_holm=p_holm,
    )


def effect(contrast: Contrast) -> Effect:
    """A contrast that decides nothing."""
    return effect_of(tested(contrast))
