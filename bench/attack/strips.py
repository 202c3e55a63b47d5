"""Strips of images: clean, difference, and what an attack made of them."""

from typing import Any

import torch
from matplotlib.figure import Figure

from ironmoe.bench.attack.outcome import EvaluationOutcome, ShownImage
from ironmoe.bench.common.radii import exact, to_255
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.image_strips import image_strip, strip_in_words


def examples(outcome: EvaluationOutcome, shown: list[ShownImage]) -> Figure:
    """Draw the images. The number of each among the attacked images stands above it, and what
    became of it below."""
    images, texts = _contents(outcome, shown)
    return image_strip(images, outcome.images.classes, **texts)


def examples_in_words(outcome: EvaluationOutcome, shown: list[ShownImage]) -> str:
    """What ``examples`` shows."""
    images, texts = _contents(outcome, shown)
    return strip_in_words(images, outcome.images.classes, **texts)


def _contents(
    outcome: EvaluationOutcome, shown: list[ShownImage]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(the images, the texts above and below them)"""
    rows = [_example(outcome, one) for one in shown]
    images = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    above = [f"image {int(outcome.index[one.number])}" for one in shown]
    below = [f"{one.attack}\n{_fate(outcome, one)}" for one in shown]
    return images, {"above": above, "below": below}


def _fate(outcome: EvaluationOutcome, one: ShownImage) -> str:
    """What became of an image, in two lines."""
    if one.margin is not None:
        return f"held at ≤ {exact(outcome.suite.eps_255[-1])}/255\nmargin left {one.margin:.3g}"
    summary = outcome.report.attacks[one.attack]
    distance = to_255(float(summary.distance[one.number]))
    queries = counted(int(summary.steps[one.number]), "question")
    return f"fell at {exact(one.fell_at_255)}/255\nat {distance:.3g}/255, {queries}"


def _example(outcome: EvaluationOutcome, one: ShownImage) -> dict[str, torch.Tensor]:
    summary = outcome.report.attacks[one.attack]
    clean, _ = outcome.images.at([int(outcome.index[one.number])])
    return {
        "clean": clean[0],
        "adversarial": summary.final(torch.tensor([one.number]))[0],
        "label": outcome.labels[one.number],
        "prediction": summary.prediction[one.number],
    }
