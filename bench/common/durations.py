"""Times as people say them."""

import math
from collections.abc import Callable

SECONDS_IN = {"days": 86400, "h": 3600, "min": 60}


def in_words(seconds: float) -> str:
    """A time, rounded: "40 s", "12 min", "2.5 h", "3 days"."""
    number, unit = _rounded(seconds, round)
    return f"{seconds / SECONDS_IN[unit]:.1f} h" if unit == "h" else f"{number} {unit}"


def range_in_words(least: float, most: float) -> str:
    """A range of times, rounded outwards: "8 s to 16 min", "2 to 5 min", or "about 12 min" where
    its ends are alike."""
    if _are_alike(least, most):
        return f"about {' '.join(_rounded(most, round))}"
    (low, low_unit), (high, high_unit) = _rounded(least, math.floor), _rounded(most, math.ceil)
    return f"{low}{'' if low_unit == high_unit else f' {low_unit}'} to {high} {high_unit}"


def left_in_words(ends: tuple[float, float], expected: float | None) -> str:
    """The time left as a range, and before it the one that is expected if that is known: "about 5
    min left (1 s to 20 min)", "1 s to 20 min left", "about 12 min left"."""
    if expected is None or _are_alike(*ends):
        return f"{range_in_words(*ends)} left"
    return f"about {' '.join(_rounded(expected, round))} left ({range_in_words(*ends)})"


def _are_alike(least: float, most: float) -> bool:
    return _rounded(least, round) == _rounded(most, round)


def _rounded(seconds: float, to_whole: Callable[[float], int]) -> tuple[str, str]:
    """(number, unit)"""
    for unit, seconds_in_it in SECONDS_IN.items():
        if seconds >= 1.5 * seconds_in_it:
            return f"{to_whole(seconds / seconds_in_it)}", unit
    return f"{max(to_whole(seconds), 1)}", "s"
