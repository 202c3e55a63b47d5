"""Accuracies of one or several reports, as rows of plain values."""

from collections.abc import Sequence

from ironmoe.attacks.evaluation.proportion import Proportion
from ironmoe.attacks.evaluation.report import RobustnessReport
from ironmoe.attacks.results.image_rows import Reports
from ironmoe.attacks.results.outcomes import CLEAN, WORST_CASE, Outcomes, Values, outcomes_of
from ironmoe.attacks.results.rows_file import Kind, Row, rows_as_text

ACCURACY_KINDS: dict[str, Kind] = {
    "eps": float,
    "accuracy": float,
    "low": float,
    "high": float,
    "confidence": float,
    "right": lambda text: int(text) if text.isdigit() else float(text),
    "images": int,
    "undecided": int,
}


def accuracies(reports: Reports, *, confidence: float = 0.95) -> list[Row]:
    """One row for the clean accuracy, for each attack and radius, and for the worst case.

    The columns:

    - ``model``: its name; None where one report is given
    - ``attack``: its name; "clean"; or "worst case", in which an image counts only if it held
      against every attack. A single attack has no such row
    - ``eps``: the radius; None in the row "clean", and in a worst case of attacks that have no
      radius in common, each of which counts at its own largest radius
    - ``accuracy``, ``low``, ``high``: a share, and its Wilson interval
    - ``confidence``: that of the interval
    - ``right``, ``images``: how many images hold, and how many there are
    - ``undecided``: how many of ``right`` a budget left undecided. They may still fall, so the
      accuracy is an upper bound, and the interval reaches down to where all of them fall

    Args:
        reports: what ``evaluate`` returned, or model → report for several models.

    Raises:
        ValueError: a confidence that does not lie between 0 and 1.
    """
    named = {None: reports} if isinstance(reports, RobustnessReport) else reports
    return [
        {"model": model} | row
        for model, report in named.items()
        for row in _rows_of(outcomes_of(report), confidence)
    ]


def csv_table(reports: Reports, *, confidence: float = 0.95) -> str:
    """``accuracies(reports)`` as CSV, with a line of names above."""
    return rows_as_text(accuracies(reports, confidence=confidence), ".csv")


def _rows_of(outcomes: Outcomes, confidence: float) -> list[Row]:
    numbers, attacks = outcomes.numbers, list(outcomes.rows)
    rows = [_row(CLEAN, None, outcomes.clean(numbers), confidence)]
    rows += [
        _row(attack, eps, outcomes.under(attack, eps, numbers), confidence)
        for attack in attacks
        for eps in outcomes.radii[attack]
    ]
    radii: Sequence[float | None] = outcomes.radii_of_all(attacks) or [None]
    if len(attacks) > 1:
        rows += [
            _row(WORST_CASE, eps, outcomes.under_all(attacks, eps, numbers), confidence)
            for eps in radii
        ]
    return rows


def _row(attack: str, eps: float | None, values: Values, confidence: float) -> Row:
    known = [value for value in values if value is not None]
    undecided = len(values) - len(known)
    right = round(sum(known))
    share = Proportion(right + undecided, len(values))

    return {
        "attack": attack,
        "eps": eps,
        "accuracy": share.value if values else None,
        "low": Proportion(right, len(values)).interval(confidence)[0],
        "high": share.interval(confidence)[1],
        "confidence": confidence,
        "right": share.count,
        "images": share.total,
        "undecided": undecided,
    }
