"""Accuracies of one or several reports, as rows of plain values."""

from collections.abc import Sequence

import torch

from ironmoe.attacks.evaluation.expected import ExpectedAccuracy
from ironmoe.attacks.evaluation.findings.accuracy import Accuracy, AccuracyRange, Known
from ironmoe.attacks.evaluation.proportion import Proportion
from ironmoe.attacks.results.image_rows import Reports, by_model
from ironmoe.attacks.results.outcomes import CLEAN, WORST_CASE, Outcomes, Values, outcomes_of
from ironmoe.attacks.results.rows_file import Kind, Row, rows_as_text

ACCURACY_KINDS: dict[str, Kind] = {
    "eps": float,
    "accuracy": float,
    "least": float,
    "most": float,
    "low": float,
    "high": float,
    "confidence": float,
    "right": lambda text: int(text) if text.isdigit() else float(text),
    "images": int,
    "undecided": int,
    "passes": int,
    "skipped": int,
    "skipped_under_attack": int,
    "least_if_skipped_fell": float,
    "most_if_skipped_fell": float,
}


def accuracies(reports: Reports, *, confidence: float = 0.95) -> list[Row]:
    """One row for the clean accuracy, for each attack and radius, and for the worst case.

    The columns:

    - ``model``: its name; None where one report is given
    - ``attack``: its name; "clean"; or "worst case", in which an image counts only if it held
      against every attack. A single attack has no such row
    - ``eps``: the radius; None in the row "clean", and in a worst case of attacks that have no
      radius in common, each of which counts at its own largest radius
    - ``accuracy``: a share; None where a budget left images undecided
    - ``least``, ``most``: the share if all undecided images fall, and if all of them hold; without
      any both are the accuracy
    - ``low``, ``high``: its Wilson interval, from that of ``least`` to that of ``most``
    - ``confidence``: that of the interval
    - ``right``, ``images``: how many images are known to hold, and how many count; of a random
      model, how many a pass gets right on average
    - ``undecided``: how many images a budget left undecided
    - ``passes``: how many passes of the model each verdict rests on; with more than 1 it is random,
      and an accuracy is the expected one of a pass
    - ``skipped``: how many images are left out of all of these, since nothing finite came of them
    - ``skipped_under_attack``: those of them for which the model is finite without an attack: an
      attacker who is free to do so drives it to NaN
    - ``least_if_skipped_fell``, ``most_if_skipped_fell``: the same as ``least`` and ``most`` with
      ``skipped_under_attack`` counted, too: as fallen from the radius on at which the attack drove
      the model to NaN, and in the row "clean" as what they are

    Args:
        reports: what ``evaluate`` returned, or model → report for several models.

    Raises:
        ValueError: a confidence that does not lie between 0 and 1.
        TypeError: something else than reports.
    """
    return [
        {"model": model} | row
        for model, report in by_model(reports).items()
        for row in _rows_of(outcomes_of(report), confidence)
    ]


def csv_table(reports: Reports, *, confidence: float = 0.95) -> str:
    """``accuracies(reports)`` as CSV, with a line of names above."""
    return rows_as_text(accuracies(reports, confidence=confidence), ".csv")


def _rows_of(outcomes: Outcomes, confidence: float) -> list[Row]:
    attacks = list(outcomes.rows)
    shares: list[tuple[str, float | None, list[str]]] = [(CLEAN, None, [])]
    shares += [(attack, eps, [attack]) for attack in attacks for eps in outcomes.radii[attack]]
    if len(attacks) > 1:
        radii: Sequence[float | None] = outcomes.radii_of_all(attacks) or [None]
        shares += [(WORST_CASE, eps, attacks) for eps in radii]

    counted, finite = outcomes.numbers, outcomes.finite
    left_out = {
        "skipped": len(outcomes.first) - len(counted),
        "skipped_under_attack": len(finite) - len(counted),
    }
    rows = []
    for name, eps, of in shares:
        values, with_driven = (
            outcomes.under_all(of, eps, numbers, driven_fell=True)
            if of
            else outcomes.clean(numbers)
            for numbers in (counted, finite)
        )
        row = {"attack": name, "eps": eps} | _numbers(values, outcomes, confidence)
        rows.append(row | left_out | _if_skipped_fell(with_driven, outcomes))
    return rows


def _if_skipped_fell(values: Values, outcomes: Outcomes) -> Row:
    accuracy = _accuracy(values, outcomes)
    return {
        "least_if_skipped_fell": accuracy.least.value if values else None,
        "most_if_skipped_fell": accuracy.most.value if values else None,
    }


def _accuracy(values: Values, outcomes: Outcomes) -> Accuracy:
    undecided = values.count(None)
    most = _known([1.0 if value is None else value for value in values], outcomes)
    return AccuracyRange(most, undecided) if undecided else most


def _numbers(values: Values, outcomes: Outcomes, confidence: float) -> Row:
    """The columns of one accuracy."""
    accuracy = _accuracy(values, outcomes)
    low, high = accuracy.interval(confidence)
    least, most, undecided = accuracy.least, accuracy.most, accuracy.undecided
    return {
        "accuracy": None if undecided or not values else most.value,
        "least": least.value if values else None,
        "most": most.value if values else None,
        "low": low,
        "high": high,
        "confidence": confidence,
        "right": least.count,
        "images": most.total,
        "undecided": undecided,
        "passes": outcomes.passes,
    }


def _known(values: Sequence[float], outcomes: Outcomes) -> Known:
    if outcomes.passes == 1:
        return Proportion(round(sum(values)), len(values))
    half = outcomes.passes // 2
    right = torch.tensor([round(value * half) for value in values], dtype=torch.int64)
    return ExpectedAccuracy(right, half, outcomes.alike)
