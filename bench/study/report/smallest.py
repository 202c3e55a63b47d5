"""The smallest effects that so many runs, scattering as they do, could have found."""

from collections.abc import Callable, Sequence
from math import atanh, isnan, log1p

from ironmoe.bench.common.statistics import spread
from ironmoe.bench.study.claims.parts.units import CLOSEST_TO_ONE, CORRELATION, POINTS, RATIO
from ironmoe.bench.study.claims.parts.verdict import Effect, Verdict
from ironmoe.bench.study.claims.parts.words import amount
from ironmoe.bench.study.report.arms import Table
from ironmoe.bench.study.report.cells import DASH, UNITS
from ironmoe.bench.study.statistics.power import power

LEVEL, CHANCE = 0.05, 0.8
FEWEST_RUNS = 3
HALVINGS = 50
LARGEST = 1e3  # standard deviations

BACK: dict[str, Callable[[float], float]] = {
    POINTS.name: lambda shown: shown,
    RATIO.name: lambda shown: log1p(shown / 100),
    CORRELATION.name: lambda shown: atanh(max(-CLOSEST_TO_ONE, min(CLOSEST_TO_ONE, shown))),
}
"""From a printed number to the scale on which runs are compared."""


def smallest_effects(verdicts: Sequence[Verdict]) -> Table:
    """A row for each primary contrast with three runs or more."""
    rows = []
    for verdict in verdicts:
        claims = max(1, claims_tested(verdicts, verdict.training))
        for effect in verdict.effects:
            found = smallest(effect, LEVEL / claims) if effect.role == "primary" else None
            if found is None:
                continue
            enough = DASH if verdict.runs_needed is None else str(verdict.runs_needed)
            rows.append(
                [
                    effect.label,
                    verdict.training,
                    str(effect.runs),
                    found,
                    effect.smallest_text,
                    enough,
                ]
            )
    headers = ["contrast", "training", "runs", "could be found", "of interest", "runs to decide"]
    return Table("Smallest effects", headers, rows)


def claims_tested(verdicts: Sequence[Verdict], training: str) -> int:
    """How many claims Holm's correction of this training goes over."""
    return sum(
        verdict.training == training and any(not isnan(effect.p_holm) for effect in verdict.effects)
        for verdict in verdicts
    )


def smallest(effect: Effect, level: float) -> str | None:
    """What a two-sided paired t test at this level would have found in four studies of five, were
    runs to scatter as they do here: "3.1 points". None for fewer than three runs."""
    values = [BACK[effect.unit](value) for value in effect.by_seed.values()]
    if len(values) < FEWEST_RUNS:
        return None
    unit = UNITS[effect.unit]
    found = spread(values).sd * deviations(len(values), level)
    return amount(unit.shown(found), unit)


def deviations(runs: int, level: float) -> float:
    """The effect, in standard deviations of paired differences, that is found in four studies of
    five."""
    low, high = 0.0, 1.0
    while power(high, 1.0, runs, level=level) < CHANCE and high < LARGEST:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if power(middle, 1.0, runs, level=level) < CHANCE:
            low = middle
        else:
            high = middle
    return high
