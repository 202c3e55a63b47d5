"""Pieces of sentences with numbers in them."""

from collections.abc import Collection, Sequence
from math import isnan

from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.claims.parts.units import Unit
from ironmoe.bench.study.claims.parts.verdict import Effect

MOST = 10_000  # per cent; larger numbers come from hardly any runs, and mean nothing


def number(value: float, digits: int = 1) -> str:
    """With a minus sign, and no sign before zero. Of what is beyond MOST only that it is."""
    if abs(value) > MOST:
        return f"{'more than ' if value > 0 else 'less than −'}{MOST:,}"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def amount(value: float, unit: Unit) -> str:
    """How large something is, without its sign: "3.1 points"."""
    return f"{number(abs(value), unit.digits)} {unit.name}".strip()


def compared(effect: Effect, unit: Unit, more: str, less: str, same: str) -> str:
    """``more`` or ``less`` with the amount put in for {}, or ``same`` if it rounds to 0."""
    if round(effect.mean, unit.digits) == 0:
        return same
    return (more if effect.mean > 0 else less).format(amount(effect.mean, unit))


def interval(effect: Effect, unit: Unit) -> str:
    """In brackets: "(95 % interval of the difference 1.0 to 5.2, 8 paired runs)"; below 0 where
    words say that something is less."""
    runs = counted(effect.runs, "paired run")
    if isnan(effect.low):
        return f"({runs}, no interval)"
    low, high = number(effect.low, unit.digits), number(effect.high, unit.digits)
    percent = f" {unit.name}" * (unit.name == "%")
    of_what = " of the difference" * bool(unit.name)  # a correlation is none
    return f"(95 % interval{of_what} {low} to {high}{percent}, {runs})"


def p_text(p: float) -> str:
    """Three digits behind the point at most."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {round(p, 3):.3g}" if p >= 0.0995 else f"p = {p:.3f}"


def listed(names: Sequence[object], joint: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    *before, last = map(str, names)
    return f"{', '.join(before)} {joint} {last}" if before else last


def left_out(seeds: Collection[int]) -> list[str]:
    """A sentence about seeds that not every arm has, if there are any."""
    if not seeds:
        return []
    noun, verb = ("Seed", "is") if len(seeds) == 1 else ("Seeds", "are")
    return [
        f"{noun} {listed(sorted(seeds))} {verb} left out: some arm has no such number there, or "
        "none that can be compared."
    ]
