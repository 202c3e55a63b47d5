"""How many paired runs would decide a claim that is undecided."""

from collections.abc import Sequence
from math import inf

from ironmoe.bench.study.claims.parts.contrast import Tested
from ironmoe.bench.study.statistics.power import fewest_runs, power

MOST_RUNS = 1_000  # nobody trains more
CHANCE = 0.8
BEYOND = 0.05  # the level of a 95 % interval


def runs_to_decide(tests: Sequence[Tested], direction: int, level: float) -> int | None:
    """How many runs would give a verdict in four studies of five, if the true effects and their
    scatter are those that were found. The rules are those of ``rules.reason``.

    tests: of the primary contrasts; direction: of the claim; level: of a test after Holm's
    correction, in its first step. None: more than 1,000, or one run, which does not say how much
    runs scatter.
    """
    runs = min(test.paired.runs for test in tests)
    if runs < 2:
        return None
    if direction == 0:
        all_agree, any_is = (
            [_equal(test, level) for test in tests],
            [_change(test, level) for test in tests],
        )
    else:
        all_agree = [_beyond(test, direction, level) for test in tests]
        any_is = [_opposite(test, direction, level) for test in tests]
        any_is += [_equal(test, level) for test in tests]

    needed = min(max(all_agree), *any_is)
    return None if needed > MOST_RUNS else max(int(needed), runs + 1)


def _beyond(test: Tested, direction: int, level: float) -> float:
    """That the whole interval lies beyond the smallest effect of interest."""
    mean, margin = direction * test.paired.mean, test.contrast.unit.smallest
    if mean <= margin:
        return inf
    return max(_runs(test, mean - margin, BEYOND), _runs(test, mean, level))


def _opposite(test: Tested, direction: int, level: float) -> float:
    mean = -direction * test.paired.mean
    return _runs(test, mean, min(level, BEYOND)) if mean > 0 else inf


def _change(test: Tested, level: float) -> float:
    distance = abs(test.paired.mean) - test.contrast.unit.smallest
    return _runs(test, distance, level) if distance > 0 else inf


def _equal(test: Tested, level: float) -> float:
    """That both one-sided tests exclude the smallest effect of interest."""
    mean, margin, sd = test.paired.mean, test.contrast.unit.smallest, test.paired.sd
    if abs(mean) >= margin:
        return inf
    if sd == 0:
        return 2

    def is_enough(runs: int) -> bool:
        sides = [power(margin + sign * mean, sd, runs, level=2 * level) for sign in (1, -1)]
        return sum(sides) - 1 >= CHANCE

    return fewest_runs(is_enough, MOST_RUNS) or inf


def _runs(test: Tested, distance: float, level: float) -> float:
    """That tell this distance from none, by a two-sided test."""
    sd = test.paired.sd
    if sd == 0:
        return 2
    return fewest_runs(lambda n: power(distance, sd, n, level=level) >= CHANCE, MOST_RUNS) or inf
