"""How many paired runs a question needs."""

from collections.abc import Callable
from math import isfinite, sqrt

from scipy import special

MOST_RUNS = 100_000
NO_OTHER_TAIL = 5.0
"""From here on the wrong sign is found in less than 1e-9 of studies, and scipy may give NaN for how
often."""


def power(effect: float, sd: float, runs: int, *, level: float = 0.05) -> float:
    """The chance that the two-sided paired t test finds a difference, by the noncentral t
    distribution.

    Args:
        effect: the true mean of the paired differences.
        sd: their true standard deviation, more than 0.
        runs: how many pairs, at least 2.
        level: of the test.
    """
    freedom = runs - 1
    shift = abs(effect) / sd * sqrt(runs)
    critical = float(special.stdtrit(freedom, 1 - level / 2))
    found = 1 - float(special.nctdtr(freedom, shift, critical))
    if shift < NO_OTHER_TAIL:
        found += float(special.nctdtr(freedom, shift, -critical))
    return found


def runs_needed(
    effect: float, sd: float, *, level: float = 0.05, chance: float = 0.8
) -> int | None:
    """The fewest pairs with which ``power`` is at least ``chance``; None: more than 100,000.

    Args:
        effect: the smallest difference that is to be found, not 0.
        sd: of paired differences, 0 or more, in the same unit.

    Raises:
        ValueError: another effect or sd.
    """
    if not (isfinite(effect) and effect != 0):
        raise ValueError(f"effect must be a number other than 0, got {effect}")
    if not sd >= 0:
        raise ValueError(f"sd must be at least 0, got {sd}")
    if sd == 0:
        return 2
    return fewest_runs(lambda runs: power(effect, sd, runs, level=level) >= chance, MOST_RUNS)


def fewest_runs(is_enough: Callable[[int], bool], most: int) -> int | None:
    """The fewest pairs, 2 or more, that are enough, if more than enough are enough, too; None:
    ``most`` are not."""
    enough = 2
    while not is_enough(enough):
        enough *= 2
        if enough > most:
            return None

    few = enough // 2
    while enough - few > 1:
        middle = (few + enough) // 2
        if is_enough(middle):
            enough = middle
        else:
            few = middle
    return enough
