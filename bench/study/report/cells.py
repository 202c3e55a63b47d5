"""Numbers as the report prints them. What is not a number is a dash."""

from collections.abc import Sequence
from math import isnan

from ironmoe.bench.common.statistics import spread
from ironmoe.bench.study.claims.parts.units import CORRELATION, POINTS, RATIO, Unit
from ironmoe.bench.study.claims.parts.verdict import Effect
from ironmoe.bench.study.claims.parts.words import number, p_text

DASH = "–"
UNITS: dict[str, Unit] = {unit.name: unit for unit in (POINTS, RATIO, CORRELATION)}
"""By what stands behind a number."""


def effect_text(effect: Effect) -> str:
    """The mean with its sign and unit: "+3.1 points"."""
    if isnan(effect.mean):
        return DASH
    text = number(effect.mean, UNITS[effect.unit].digits)
    sign = "+" * (effect.mean > 0 and text.strip("0.") != "")
    return f"{sign}{text} {effect.unit}".strip()


def interval_text(effect: Effect) -> str:
    """The 95 % interval, in the unit of the mean: "[1.0, 5.2]"."""
    if isnan(effect.low):
        return DASH
    digits = UNITS[effect.unit].digits
    return f"[{number(effect.low, digits)}, {number(effect.high, digits)}]"


def p_cell(p: float) -> str:
    """A p-value without its letter: "0.012", "< 0.001"."""
    return DASH if isnan(p) else p_text(p).removeprefix("p ").removeprefix("= ")


def mean_and_sd(values: Sequence[float], digits: int) -> str:
    """Over runs: "91.2 ± 0.8"; one run has no sd."""
    if not values:
        return DASH
    mean, sd, _ = spread(values)
    return number(mean, digits) if isnan(sd) else f"{number(mean, digits)} ± {number(sd, digits)}"
