"""What a report comes to, in one sentence that is true while the run is unfinished, too."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ironmoe.attacks.evaluation.findings.accuracy import Accuracy, Known, share
from ironmoe.attacks.evaluation.findings.flag import NOT_LOOKED_AT, TRIPPED, Flag, in_state
from ironmoe.attacks.evaluation.findings.idle import idle_attacks
from ironmoe.attacks.evaluation.findings.radius_text import radius_text
from ironmoe.attacks.evaluation.findings.summary import AttackSummary

MOST_RADII = 6  # of more, the smallest and the largest are named


class Report(Protocol):
    """What is asked of a report here."""

    attacks: dict[str, AttackSummary]
    checks: list[Flag]
    complete: bool
    unread: int
    search_model: str | None

    @property
    def clean_accuracy(self) -> Known: ...

    @property
    def skipped(self) -> list[int]: ...

    @property
    def skipped_under_attack(self) -> list[int]: ...

    @property
    def worst_case(self) -> Accuracy: ...

    def worst_case_at(self, eps: float) -> Accuracy: ...

    def if_skipped_fell_at(self, eps: float | None) -> Accuracy: ...


def verdict(
    report: Report,
    *,
    radius: Callable[[float], str] = radius_text,
    doubts: Sequence[str] = (),
) -> str:
    """One sentence: the worst case at each radius, and what speaks against trusting it.

    Args:
        radius: how a radius is written.
        doubts: further clauses, which come first.
    """
    if not report.attacks:
        return f"No attack was run: clean accuracy {share(report.clean_accuracy)}."
    idle = idle_attacks(report.attacks)
    if len(idle) == len(report.attacks):
        return f"Nothing is known of robustness: {_listed(idle)}."

    images = report.clean_accuracy.total
    clauses = [
        f"Of {_images(images)}, {share(report.clean_accuracy)} are classified "
        f"right without an attack and {_held(report, radius)} under "
        f"{_names(report.attacks)}",
        *_left_out(report, radius),
        *doubts,
        *_doubts(report, idle),
    ]
    return "; ".join(clauses) + "."


def radii_of_all(report: Report) -> list[float]:
    """The radii that all attacks were run at, ascending."""
    radii = [set(summary.eps) for summary in report.attacks.values()]
    return sorted(set.intersection(*radii)) if radii else []


def _held(report: Report, radius: Callable[[float], str]) -> str:
    radii = radii_of_all(report)
    if not radii:
        return f"{share(report.worst_case)} at the largest eps of each attack"
    return _at_radii(report.worst_case_at, radii, radius)


def _at_radii(
    accuracy: Callable[[float], Accuracy], radii: Sequence[float], radius: Callable[[float], str]
) -> str:
    if len(radii) > MOST_RADII:
        radii = [radii[0], radii[-1]]
    parts = [f"{share(accuracy(eps))} at {radius(eps)}" for eps in radii]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _left_out(report: Report, radius: Callable[[float], str]) -> list[str]:
    """What is left out of the accuracies, since nothing finite came of it, and what they would be
    if what an attack drove to NaN had fallen."""
    attacked = len(report.skipped_under_attack)
    clean = len(report.skipped) - attacked
    clauses = []
    if clean:
        clauses.append(f"{_images(clean)} more gave nothing finite without any attack")
    if attacked:
        clause = f"{_images(attacked)} more gave nothing finite under attack alone"
        radii = radii_of_all(report)
        fallen = (
            _at_radii(report.if_skipped_fell_at, radii, radius)
            if radii
            else f"{share(report.if_skipped_fell_at(None))} at the largest eps of each attack"
        )
        clauses.append(f"{clause}, which makes it {fallen} if they count as fallen")
    return clauses


def _doubts(report: Report, idle: Mapping[str, str]) -> list[str]:
    found = []
    if not report.complete or report.unread:
        found.append(_unfinished(report))
    if idle:
        found += [f"{name} could find nothing, since {why}" for name, why in idle.items()]
    elif _nothing_fell(report) and report.complete:
        found.append(
            "no image fell, which these attacks cannot tell from attacks that are too weak"
        )
    if report.search_model is not None:
        found.append("the attacks searched on another model")
    tripped = [flag.name for flag in in_state(report.checks, TRIPPED)]
    if tripped:
        found.append(
            f"{_checks(len(tripped))} against false security tripped ({', '.join(tripped)}), so "
            "the model may be weaker than it looks"
        )
    unseen = len(in_state(report.checks, NOT_LOOKED_AT))
    if unseen:
        found.append(f"{_checks(unseen)} could not be made")
    elif not report.checks:
        found.append("checks against false security were not made")
    return found


def _unfinished(report: Report) -> str:
    summaries = report.attacks.values()
    undecided = sum(int((~summary.decided).sum()) for summary in summaries)
    pairs = sum(len(summary.decided) for summary in summaries)
    unread = f", and {report.unread} images were not reached" if report.unread else ""
    noun = "images" if len(report.attacks) == 1 else "(image, attack) pairs"
    return f"a budget ended this early, {undecided} of {pairs} {noun} are undecided{unread}"


def _nothing_fell(report: Report) -> bool:
    return not any(bool(summary.fell.any()) for summary in report.attacks.values())


def _names(attacks: Mapping[str, AttackSummary]) -> str:
    """The attacks with their norm: "a and b in Linf", or "a in Linf and b in L2"."""
    norms = {summary.norm for summary in attacks.values()}
    of_all = f" in {next(iter(norms))}" if len(norms) == 1 and "" not in norms else ""
    names = [
        f"{name} in {summary.norm}" if summary.norm and not of_all else name
        for name, summary in attacks.items()
    ]
    *others, last = names
    return (f"{', '.join(others)} and {last}" if others else last) + of_all


def _listed(idle: Mapping[str, str]) -> str:
    return "; ".join(f"{name} attacked no image, since {why}" for name, why in idle.items())


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _checks(count: int) -> str:
    return f"{count} check{'s' * (count != 1)}"
