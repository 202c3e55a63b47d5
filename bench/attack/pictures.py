"""The pictures of ``ironmoe attack``, each with a title and a note that says what it shows."""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from ironmoe.attacks import AttackSummary
from ironmoe.bench.attack.curves import (
    accuracy,
    accuracy_series,
    clean_point,
    distance_label,
    distances,
    many_attacks,
    steps,
)
from ironmoe.bench.attack.outcome import EvaluationOutcome, ShownImage
from ironmoe.bench.attack.strips import examples, examples_in_words
from ironmoe.bench.common.radii import to_255
from ironmoe.bench.reports.model_results import ModelResults
from ironmoe.bench.reports.page import Picture
from ironmoe.bench.reports.robust_accuracy import series_in_words
from ironmoe.bench.reports.routing_pictures import expert_load, routing_change


def draw_evaluation(outcome: EvaluationOutcome) -> dict[str, Picture]:
    """The pictures by file name. A picture that would be empty is left out."""
    attacks = outcome.report.attacks.values()
    pictures = {}
    if outcome.report.clean_accuracy.total:
        pictures["robust_accuracy.png"] = _accuracy(outcome)
    if any(bool(summary.fell.any()) for summary in attacks):
        pictures |= {"distances.png": _distances(outcome), "steps.png": _steps(outcome)}
    if outcome.margins is not None:
        pictures |= _strips(outcome)
    if outcome.routing:
        pictures |= _routing(outcome)
    return pictures


def _accuracy(outcome: EvaluationOutcome) -> Picture:
    band = "Bands and bars are 95 % Wilson intervals."
    if many_attacks(outcome) and len(outcome.suite.eps_255) > 1:
        band = "The band is the 95 % Wilson interval of the worst case."

    worst = ""
    if len(outcome.report.attacks) > 1:
        worst = " Worst case: an image counts only if it holds against every attack."

    return Picture(
        "Robust accuracy against eps",
        f"The share of all images that hold. {band}{worst}{_open(outcome)}",
        accuracy(outcome),
        series_in_words(accuracy_series(outcome), clean_point(outcome)),
    )


def _distances(outcome: EvaluationOutcome) -> Picture:
    return Picture(
        "Distances of the confirmed adversarial images",
        f"{distance_label(outcome.suite.norm)}; dotted lines are the radii. An attack that stops "
        "at its first success stays where it found it, often on the edge of the ball: these are "
        f"no smallest distances.{_so_far(outcome)}",
        distances(outcome),
        "Histograms. " + _each_attack(outcome, _median_distance),
    )


def _steps(outcome: EvaluationOutcome) -> Picture:
    return Picture(
        "Questions to success",
        "Of the images right from the start, those that had fallen after so many questions to the "
        "model in the successful attempt, at the eps where they fell. A step is one question; of "
        "DeepFool and FAB several. Each curve ends, with a mark, at the longest attempt that its "
        "attack allows. Still rising there, it says that more steps would find more."
        f"{_so_far(outcome)}",
        steps(outcome),
        "Shares over the number of questions. " + _each_attack(outcome, _median_steps),
    )


def _strips(outcome: EvaluationOutcome) -> dict[str, Picture]:
    scale = (
        " Differences are scaled to their largest entry, which is written below them; grey is none."
        f"{_so_far(outcome)}"
    )
    pictures = {}
    if easiest := outcome.easiest():
        note = f"They fell at the smallest eps, the nearest first.{scale}"
        pictures["easiest.png"] = _strip(outcome, easiest, "The easiest images", note)

    if hardest := outcome.hardest():
        note = (
            "They held against every attack, those with the largest margin left first; then those "
            "that fell last. For images that held, the final image of the attack that came closest "
            f"is shown.{scale}"
        )
        pictures["hardest.png"] = _strip(outcome, hardest, "The hardest images", note)

    return pictures


def _strip(outcome: EvaluationOutcome, shown: list[ShownImage], title: str, note: str) -> Picture:
    return Picture(title, note, examples(outcome, shown), examples_in_words(outcome, shown))


def _routing(outcome: EvaluationOutcome) -> dict[str, Picture]:
    note = (
        f"PGD with {outcome.suite.pgd_steps} steps at its full length, routing free, on "
        f"{outcome.routing[0]['images']} images."
    )
    run = {
        "attacks": [{"eps_255": eps} for eps in outcome.suite.eps_255],
        "routing": outcome.routing,
    }
    results = [ModelResults(outcome.name, [run])]

    return {
        "routing_change.png": routing_change(results, note),
        "expert_load.png": expert_load(results, note),
    }


def _each_attack(outcome: EvaluationOutcome, say: Callable[[AttackSummary, Tensor], str]) -> str:
    """A sentence about each attack and the images (N,) bool that fell to it."""
    sentences = []
    for name, summary in outcome.report.attacks.items():
        of, fell = int(summary.clean_correct.sum()), int(summary.fell.sum())
        more = say(summary, summary.fell) if fell else ""
        sentences.append(f"{name}: {fell} of {of} images fell{more}.")
    return " ".join(sentences)


def _median_distance(summary: AttackSummary, fell: Tensor) -> str:
    return f", at a median distance of {to_255(float(np.median(summary.distance[fell]))):.3g}/255"


def _median_steps(summary: AttackSummary, fell: Tensor) -> str:
    return f", after a median of {np.median(summary.steps[fell]):.3g} questions"


def _open(outcome: EvaluationOutcome) -> str:
    """A sentence about the hatching, for a run that a budget ended."""
    if outcome.report.complete:
        return ""
    nothing = [name for name in outcome.report.attacks if not outcome.decided_something(name)]
    left_out = f" Not drawn, since nothing was decided: {', '.join(nothing)}." if nothing else ""
    return (
        " Hatched: what may still fall, since a budget ended the run before it was "
        f"decided.{left_out}"
    )


def _so_far(outcome: EvaluationOutcome) -> str:
    return "" if outcome.report.complete else " So far: a budget ended the run."
