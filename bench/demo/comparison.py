"""How the two models of the demo differ, and what is to be thought of each."""

from typing import NamedTuple

from ironmoe.bench.common.statistics import paired_difference
from ironmoe.bench.reports.model_results import ModelResults, Spread

AT_CHANCE, DOUBTFUL, HELD, FELL = "at chance", "checks tripped", "nothing fell", "fell"


def state(model: ModelResults) -> str:
    """What is to be thought of one model first."""
    if model.runs_at_chance:
        return AT_CHANCE
    if model.counted_checks["tripped"]:
        return DOUBTFUL
    return FELL if model.anything_fell else HELD


class At(NamedTuple):
    """A difference in robust accuracy at one eps, in points.

    decided: whether the interval over seeds lies on one side of 0; one seed decides nothing; text:
    the difference, and how sure it is.
    """

    eps_255: float
    mean: float
    decided: bool
    text: str


def compare(first: ModelResults, second: ModelResults) -> list[At]:
    """``first`` minus ``second`` at each eps."""
    pairs = ((first.robust(i), second.robust(i)) for i in range(len(first.eps)))
    return [_at(eps, *pair) for eps, pair in zip(first.eps, pairs, strict=True)]


def difference_of(one: Spread, other: Spread) -> str:
    """The difference of two accuracies in points: "+1.2 overlap" (of their intervals) for one seed,
    "+1.2 [−0.3, 2.7]" for several."""
    return _at(0.0, one, other).text


def _at(eps_255: float, one: Spread, other: Spread) -> At:
    found = paired_difference(one.values, other.values)
    mean = _points(found.mean)
    if found.pairs == 1:
        apart = one.interval[0] > other.interval[1] or other.interval[0] > one.interval[1]
        return At(eps_255, found.mean, False, f"{mean} {'apart' if apart else 'overlap'}")

    text = f"{mean} [{_points(found.low, '')}, {_points(found.high, '')}]"
    return At(eps_255, found.mean, found.decided, text)


def _points(share: float, sign: str = "+") -> str:
    """In points, with a sign that is as long as a digit; what is rounded to 0 has none."""
    value = round(100 * share, 1) + 0.0
    return f"{value:{sign if value else ''}.1f}".replace("-", "−")
