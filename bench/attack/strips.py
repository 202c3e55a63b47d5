"""Strips of images: clean, perturbation, and what an attack made of them."""

import torch
from matplotlib.figure import Figure

from ironmoe.bench.attack.outcome import EvaluationOutcome, ShownImage
from ironmoe.bench.common.radii import exact, to_255
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.image_strips import image_strip


def examples(outcome: EvaluationOutcome, shown: list[ShownImage]) -> Figure:
    """Draw the images. The number of each among the attacked images stands above it, and what
    became of it below."""
    rows = [_example(outcome, one) for one in shown]
    figure = image_strip(
        {key: torch.stack([row[key] for row in rows]) for key in rows[0]}, outcome.images.classes
    )
    above, below = figure.axes[: len(shown)], figure.axes[2 * len(shown) :]
    for top, bottom, one in zip(above, below, shown, strict=True):
        top.set_title(f"image {int(outcome.index[one.number])}\n{top.get_title()}", fontsize=9)
        bottom.set_xlabel(f"{one.attack}\n{_fate(outcome, one)}", fontsize=8)
    return figure


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
