"""Two evaluations of the same images, compared image by image."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ironmoe.attacks.evaluation.findings.radius_text import radius_text
from ironmoe.attacks.evaluation.report import RobustnessReport
from ironmoe.attacks.results.better import from_to, which_is_better
from ironmoe.attacks.results.outcomes import CLEAN, WORST_CASE, Outcomes, Values, outcomes_of
from ironmoe.attacks.results.paired import PairedDifference, paired_difference

# Of a model whose images draw for themselves, the passes vary less than so many times as much as
# the images show.
DRAWS_TOGETHER = 1.5


class ComparedAccuracy(NamedTuple):
    """One accuracy of both runs.

    attack: its name, "clean" or "worst case"
    eps: the radius; None for "clean", and for a worst case of attacks that have no radius in
        common, each of which counts at its own largest radius
    undecided: how many images are undecided in one of the runs: a budget left them so, or an attack
        drove the model to NaN. They count as right; but the interval reaches as far as they can
        move the difference, and the p-value is the largest that is possible, 1 if either run may
        turn out to be the better one
    result: of all images that both runs came to; its accuracies are what the runs have if all
        undecided images hold
    undecided_one, undecided_other: how many images are undecided in each run
    """

    attack: str
    eps: float | None
    undecided: int
    result: PairedDifference
    undecided_one: int = 0
    undecided_other: int = 0

    @property
    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Of each run the accuracy if all its undecided images fall, and if all hold."""
        images = max(self.result.images, 1)
        one, other = self.result.accuracy_one, self.result.accuracy_other
        return (
            (one - self.undecided_one / images, one),
            (other - self.undecided_other / images, other),
        )

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON. "accuracy_one", "accuracy_other" and "difference" are None where they are
        not known yet; "least_one", "most_one", "least_other" and "most_other" are always there."""
        numbers = {"attack": self.attack, "eps": self.eps, "undecided": self.undecided}
        numbers |= {"undecided_one": self.undecided_one, "undecided_other": self.undecided_other}
        numbers |= self.result.as_dict()
        for name, (least, most) in zip(("one", "other"), self.ends, strict=True):
            numbers |= {f"least_{name}": least, f"most_{name}": most}
            if least < most:
                numbers |= {f"accuracy_{name}": None, "difference": None}
        return numbers


class Comparison(NamedTuple):
    """What ``compare`` found: a line for each accuracy that both runs have, and in sentences what
    could not be compared."""

    lines: list[ComparedAccuracy]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; NaN where there is no image."""
        return {"lines": [line.as_dict() for line in self.lines], "notes": self.notes}

    def __str__(self) -> str:
        tests = dict.fromkeys(line.result.test for line in self.lines)
        confidence = 100 * self.lines[0].result.confidence
        methods = (
            f"p-values: {' or '.join(tests)}; intervals of differences: {confidence:g} %, Bonett "
            "and Price (2012)"
        )
        return "\n".join([*map(_told, self.lines), *self.sentences(), methods, *self.notes])

    def sentences(self, names: tuple[str, str] = ("the first run", "the second")) -> list[str]:
        """Which run is better, without an attack and in the worst case, or under the one attack."""
        worst = [line for line in self.lines if line.attack == WORST_CASE]
        attacked = worst or [line for line in self.lines if line.attack != CLEAN]
        shown = [line for line in self.lines if line.attack == CLEAN] + attacked
        return [which_is_better(line.result, where(line), names, line.ends) for line in shown]


def compare(
    one: RobustnessReport | Outcomes,
    other: RobustnessReport | Outcomes,
    *,
    confidence: float = 0.95,
) -> Comparison:
    """Compare the accuracies of two evaluations on the same images: the clean one, and those under
    attacks of the same name at the same radius; with several of them, the worst case, too.

    Test and interval are paired: they rest on the images that are right in one run only
    (``paired_difference`` says how). Each p-value is that of its line alone. Images that a budget
    kept one run from coming to are left out, and those for which a model gives nothing finite
    without an attack. Those that a budget left undecided are not, because images that fall are
    decided first; nor are those that an attack drove to NaN, because a model that breaks would look
    better for it: ``ComparedAccuracy`` says how they count.

    Args:
        one, other: what ``evaluate`` returned. The differences are those of ``one`` minus
            ``other``.
        confidence: that of the intervals, between 0 and 1.

    Raises:
        ValueError: the runs are about other images: numbers in the data, labels or checksums
            differ.
    """
    first, second = (run if isinstance(run, Outcomes) else outcomes_of(run) for run in (one, other))
    _check_same_images(first, second)
    numbers = _common(first.finite, second.finite)

    lines = [
        _compared(attack, eps, values, others, confidence)
        for attack, eps, values, others in _accuracies(first, second, numbers)
    ]
    return Comparison(lines, _notes(first, second))


def _compared(
    attack: str, eps: float | None, one: Values, other: Values, confidence: float
) -> ComparedAccuracy:
    def result(undecided_in_one: float, undecided_in_other: float) -> PairedDifference:
        values, others = _filled(one, undecided_in_one), _filled(other, undecided_in_other)
        return paired_difference(values, others, confidence=confidence)

    undecided = sum(None in pair for pair in zip(one, other, strict=True))
    so_far = result(1, 1)
    if not undecided:
        return ComparedAccuracy(attack, eps, undecided, so_far)

    least, most = result(0, 1), result(1, 0)
    either_way = least.difference <= 0 <= most.difference
    interval = least.interval[0], most.interval[1]
    p_value = 1.0 if either_way else max(least.p_value, most.p_value)
    allowing = so_far._replace(interval=interval, p_value=p_value)
    each = one.count(None), other.count(None)
    return ComparedAccuracy(attack, eps, undecided, allowing, *each)


def _filled(values: Values, undecided: float) -> list[float]:
    return [undecided if value is None else value for value in values]


def _check_same_images(one: Outcomes, other: Outcomes) -> None:
    for name, run, another in (("one", one, other), ("other", other, one)):
        more = sorted(another.first.keys() - run.first.keys())
        if more and run.complete:
            raise ValueError(
                f"one and other must be about the same images, got {len(one.first)} and "
                f"{len(other.first)}; {name} is complete without image {more[0]}"
            )

    for what in ("label", "checksum"):
        for number in sorted(one.first.keys() & other.first.keys()):
            values = (one.first[number][what], other.first[number][what])
            if None not in values and values[0] != values[1]:
                raise ValueError(
                    f"one and other must be about the same images, got image {number} with "
                    f"{what} {values[0]} and {values[1]}"
                )


def _accuracies(
    one: Outcomes, other: Outcomes, numbers: Sequence[int]
) -> list[tuple[str, float | None, Values, Values]]:
    """(attack, eps, values of one, values of other) for each accuracy that both runs have."""
    found: list[tuple[str, float | None, Values, Values]] = [
        (CLEAN, None, one.clean(numbers), other.clean(numbers))
    ]
    attacks = _common(list(one.rows), list(other.rows))
    for attack in attacks:
        for eps in _common(one.radii[attack], other.radii[attack]):
            values, others = (run.under(attack, eps, numbers) for run in (one, other))
            found.append((attack, eps, values, others))

    if len(attacks) > 1:
        radii = _common(one.radii_of_all(attacks), other.radii_of_all(attacks))
        for radius in radii or _largest(one, other, attacks):
            values, others = (run.under_all(attacks, radius, numbers) for run in (one, other))
            found.append((WORST_CASE, radius, values, others))
    return found


def _largest(one: Outcomes, other: Outcomes, attacks: Sequence[str]) -> list[None]:
    """[None], which stands for the largest radius of each attack, if the runs have the same."""
    same = all(one.radii[attack][-1] == other.radii[attack][-1] for attack in attacks)
    return [None] if same else []


def _notes(one: Outcomes, other: Outcomes) -> list[str]:
    notes: list[str] = []
    for run, another, name in ((one, other, "the first run"), (other, one, "the second run")):
        only = [attack for attack in run.rows if attack not in another.rows]
        if only:
            notes.append(f"Only {name} has {', '.join(only)}.")
        radii = {
            attack: sorted({*run.radii[attack]} - {*another.radii[attack]})
            for attack in _common(list(run.rows), list(another.rows))
        }
        notes += [
            f"Only {name} has {attack} at {', '.join(map(radius_text, more))}."
            for attack, more in radii.items()
            if more
        ]
    for run, name in ((one, "first"), (other, "second")):
        undecided, pairs = run.undecided
        if undecided and not run.complete:
            notes.append(
                f"The {name} run is unfinished: {undecided} of {pairs} (image, attack) pairs are "
                "undecided."
            )
        if run.alike > DRAWS_TOGETHER:
            notes.append(
                f"The model of the {name} run draws for many images at once, so that a pass varies "
                f"{run.alike:.1f} times as much as its images show: intervals and p-values, which "
                "do not know it, are too small."
            )
    shared = _common(list(one.rows), list(other.rows))
    if not any(_common(one.radii[attack], other.radii[attack]) for attack in shared):
        notes.append(
            "No attack was run at one radius in both runs: only the clean accuracy is compared."
        )
    missing = len(one.first.keys() ^ other.first.keys())
    if missing:
        notes.append(f"Images left out, because one run did not come to them: {missing}.")
    both = one.first.keys() & other.first.keys()
    compared = {*_common(one.finite, other.finite)}
    skipped = len(both - compared)
    if skipped:
        notes.append(f"Images left out, because one run skipped them: {skipped}.")
    for run, name in ((one, "first"), (other, "second")):
        driven = len(compared - {*run.numbers})
        if driven:
            notes.append(
                f"Images that an attack of the {name} run drove to NaN: {driven}. From that radius "
                "on they count as undecided, so that a range reaches from where they fall to where "
                "they hold."
            )
    return notes


def _common(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    others = set(other)
    return [each for each in one if each in others]


def where(line: ComparedAccuracy, attack: str | None = None, radius: str | None = None) -> str:
    """What a line is about: "Under pgd at 8/255". ``attack`` and ``radius`` say it otherwise."""
    if line.attack == CLEAN:
        return "Without an attack"
    at = "" if line.eps is None else f" at {radius or radius_text(line.eps)}"
    if line.attack == WORST_CASE:
        return f"In the worst case{at}"
    return f"Under {attack or line.attack}{at}"


def difference_told(line: ComparedAccuracy) -> str:
    """The difference in points: "+1.5", or "+1.5 to +9.0" where images are undecided."""
    (least_one, most_one), (least_other, most_other) = line.ends
    ends = least_one - most_other, most_one - least_other
    low, high = (round(100 * end, 1) + 0.0 for end in ends)  # no −0.0
    return f"{high:+.1f}" if not line.undecided else f"{low:+.1f} to {high:+.1f}"


def _told(line: ComparedAccuracy) -> str:
    """A line for people."""
    result = line.result
    if not result.images:
        return f"{line.attack}: no image in both runs"
    at = "" if line.eps is None else f" at {radius_text(line.eps)}"
    out = f", {line.undecided} of them undecided" if line.undecided else ""
    low, high = result.interval
    return (
        f"{line.attack}{at}: {from_to(*line.ends[0])} and {from_to(*line.ends[1])}, difference "
        f"{difference_told(line)} [{100 * low:+.1f}, {100 * high:+.1f}], p {result.p_value:.3g}, "
        f"{result.images} images{out}"
    )
