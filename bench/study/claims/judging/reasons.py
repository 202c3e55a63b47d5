"""Why a verdict is what it is, in sentences."""

from collections.abc import Sequence
from typing import NamedTuple

from ironmoe.bench.study.claims.judging.needed import MOST_RUNS
from ironmoe.bench.study.claims.judging.rules import FEWEST_RUNS, PValues
from ironmoe.bench.study.claims.parts.claim import Findings
from ironmoe.bench.study.claims.parts.contrast import PAIRED_T, PERMUTATION, Tested
from ironmoe.bench.study.claims.parts.verdict import BECAUSE
from ironmoe.bench.study.claims.parts.words import listed, p_text

ENOUGH_FOR_SIGNS = 6  # pairs with which flipping signs can reach 5 %
T_INTERVAL = "t intervals, which take the differences to be normal"
ASSUMES = {
    PAIRED_T: f"t tests and {T_INTERVAL}",
    PERMUTATION: (
        f"permutations of the arms of a seed, which take these to be exchangeable, and {T_INTERVAL}"
    ),
}
"""By the name of a test: what a verdict rests on that is no test by flipping signs."""


class Judged(NamedTuple):
    """direction: of the claim; because: the rule that applied; tests: of its primary contrasts; p:
    after Holm's correction over ``claims``; needed: runs that would decide; findings: of the
    claim."""

    direction: int
    because: str
    tests: Sequence[Tested]
    p: PValues
    claims: int
    needed: int | None
    findings: Findings


def reason_in_words(judged: Judged) -> list[str]:
    """The rule that applied; how many runs would decide; what few runs cannot show."""
    if judged.because == "few runs":
        return [_few(_runs(judged))]
    if judged.because == "blind":
        return [judged.findings.blind]
    if judged.because == "confounded":
        return [judged.findings.confounded, *_signs(judged)]
    return [_rule(judged), *_needed(judged), *_signs(judged)]


def _rule(judged: Judged) -> str:
    unit = judged.tests[0].contrast.unit
    so, opposite, equal = (_p(p, judged.claims) for p in judged.p)
    match judged.because:
        case "effect":
            intervals = "The whole interval" if len(judged.tests) == 1 else "Each whole interval"
            smallest = f"{unit.smallest_text}, the smallest effect of interest"
            return f"{intervals} lies beyond {smallest} ({so})."
        case "equivalence":
            return f"A change of {unit.smallest_text} or more is excluded ({equal})."
        case "opposite":
            other_side = _intervals(judged, -judged.direction, "on the other side of 0")
            return f"{other_side}: the opposite of the claim ({opposite})."
        case "no difference":
            least = min(judged.tests, key=lambda test: test.p_equivalent)
            return f"There is {unit.none_text}{_with(least)} ({equal})."
        case "change":
            most = min(judged.tests, key=lambda test: test.p_beyond)
            return f"That is a change of more than {unit.smallest_text}{_with(most)} ({opposite})."
        case "contains 0":
            return _not_beyond(judged, opposite)
        case "Holm":
            return f"{_intervals(judged, judged.direction, 'beyond 0')}, but {so} is not enough."
        case "may be small":
            return (
                f"There is an effect ({so}), but it may be less than {unit.smallest_text}, the "
                "smallest one of interest."
            )
    return f"A change of {unit.smallest_text} is neither excluded ({equal}) nor shown ({opposite})."


def _not_beyond(judged: Judged, opposite: str) -> str:
    """That the interval of some contrast does not lie on the side of the claim."""
    if any(_beyond(test, -judged.direction) for test in judged.tests):
        other_side = _intervals(judged, -judged.direction, "on the other side of 0")
        return f"{other_side}, but {opposite} is not enough."

    contain = [test for test in judged.tests if not _beyond(test, judged.direction)]
    return f"{_subject(judged, contain)} contain{'s' * (len(contain) == 1)} 0."


def _intervals(judged: Judged, direction: int, where: str) -> str:
    """Those that lie wholly on one side of 0, as the beginning of a sentence."""
    lie = [test for test in judged.tests if _beyond(test, direction)]
    return f"{_subject(judged, lie)} {'lies' if len(lie) == 1 else 'lie'} {where}"


def _subject(judged: Judged, tests: Sequence[Tested]) -> str:
    if len(judged.tests) == 1:
        return "The interval"
    settings = listed([test.contrast.setting for test in tests])
    return f"The interval{'s' * (len(tests) != 1)} with {settings}"


def _with(test: Tested) -> str:
    return f" with {test.contrast.setting}" * bool(test.contrast.setting)


def _beyond(test: Tested, direction: int) -> bool:
    return test.paired.low > 0 if direction > 0 else test.paired.high < 0


def _p(p: float, claims: int) -> str:
    return p_text(p) + f" after Holm's correction for {claims} claims" * (claims > 1)


def _needed(judged: Judged) -> list[str]:
    if BECAUSE[judged.because] != "undecided":
        return []
    if judged.needed is None:
        return [f"{MOST_RUNS:,} paired runs would not be sure to decide either."]
    return [
        f"About {judged.needed} paired runs would decide in four studies of five, if effect and "
        "scatter are those of these runs."
    ]


def _signs(judged: Judged) -> list[str]:
    runs = _runs(judged)
    if runs >= ENOUGH_FOR_SIGNS or judged.direction == 0:
        return []
    rests = listed(list(dict.fromkeys(ASSUMES[test.test] for test in judged.tests)))
    return [
        f"With {runs} paired runs a test by flipping signs cannot give less than "
        f"p = {2 / 2**runs:.5g}, so this rests on {rests}."
    ]


def _few(runs: int) -> str:
    why = (
        "One paired run has no interval: another seed could give another sign."
        if runs == 1
        else f"{runs} paired runs show that results vary, and not by how much."
    )
    return f"{why} A verdict needs {FEWEST_RUNS} at least."


def _runs(judged: Judged) -> int:
    return min(test.paired.runs for test in judged.tests)
