"""How tests become a verdict, the same for every claim.

Each claim has three p-values: that it is so, that the opposite is so, and that there is no
difference of the smallest effect of interest. Each kind is corrected by Holm's method over the
claims of a training. So the chance is at most 5 % that any claim is called supported, or against
because of an opposite effect, where there is no effect at all; and at most 5 % that an effect of
the smallest size of interest or more is denied in any. "Supported" also asks that the whole 95 %
interval lies beyond that size, which would happen by chance in 2.5 % of studies of an effect of
just that size.
"""

from collections.abc import Mapping, Sequence
from math import nan
from typing import NamedTuple

from ironmoe.bench.study.claims.parts.claim import Findings
from ironmoe.bench.study.claims.parts.contrast import Tested
from ironmoe.bench.study.statistics.holm import holm

LEVEL = 0.05
FEWEST_RUNS = 3  # two seeds show that results vary, not by how much


class PValues(NamedTuple):
    """Of one claim: that it is so, that the opposite is so, that there is no difference worth
    speaking of. NaN: too few runs for a test."""

    so: float
    opposite: float
    equal: float


def p_values(tests: Sequence[Tested], direction: int) -> PValues:
    """The p-values of a claim whose primary contrasts all have to agree.

    That all do has the largest of their p-values (Berger 1982, Technometrics 24, 295–300). That one
    of k does not has k times the smallest.
    """
    if any(test.paired.runs < FEWEST_RUNS for test in tests) or not tests:
        return PValues(nan, nan, nan)

    if direction == 0:  # what it claims is that there is no difference
        changed = _any([test.p_beyond for test in tests])
        return PValues(1.0, changed, max(test.p_equivalent for test in tests))

    with_it = [test.p if direction * test.paired.mean > 0 else 1.0 for test in tests]
    against = [test.p if direction * test.paired.mean < 0 else 1.0 for test in tests]
    equal = [test.p_equivalent for test in tests]
    return PValues(max(with_it), _any(against), _any(equal))


def corrected(claims: Mapping[str, PValues]) -> dict[str, PValues]:
    """The same after Holm's correction over the claims, each kind by itself."""
    kinds = [
        holm({key: getattr(values, kind) for key, values in claims.items()})
        for kind in PValues._fields
    ]
    return {key: PValues(*(kind[key] for kind in kinds)) for key in claims}


def reason(tests: Sequence[Tested], direction: int, p: PValues, findings: Findings) -> str:
    """Which rule applies: a key of ``BECAUSE``.

    Args:
        p: after Holm's correction.
    """
    if findings.blind:
        return "blind"
    if min(test.paired.runs for test in tests) < FEWEST_RUNS:
        return "few runs"
    if direction == 0:
        return "equivalence" if p.equal <= LEVEL else "change" if p.opposite <= LEVEL else "neither"

    nearest = [_nearest(test, direction) for test in tests]
    if p.opposite <= LEVEL and any(_nearest(test, -direction) > 0 for test in tests):
        return "opposite"
    if p.equal <= LEVEL:
        return "no difference"
    if min(nearest) <= 0:
        return "contains 0"
    if p.so > LEVEL:
        return "Holm"
    if any(end <= test.contrast.unit.smallest for end, test in zip(nearest, tests, strict=True)):
        return "may be small"
    return "confounded" if findings.confounded else "effect"


def _nearest(test: Tested, direction: int) -> float:
    """The end of the interval that is nearer to 0 or beyond it, more than 0 if the interval lies on
    that side."""
    return test.paired.low if direction > 0 else -test.paired.high


def _any(p: Sequence[float]) -> float:
    return min(1.0, len(p) * min(p))
