"""Images of ``ironmoe attack``: clean, perturbation and what an attack made of them."""

import torch
from matplotlib.figure import Figure

from ironmoe.bench.attack.outcome import Outcome, Shown
from ironmoe.bench.common.results import exact
from ironmoe.bench.demo.plots import strip


def examples(outcome: Outcome, shown: list[Shown]) -> Figure:
    """Clean, perturbation, final image of each; its number among the attacked images above, what
    became of it below."""
    rows = [_example(outcome, one) for one in shown]
    figure = strip(
        {key: torch.stack([row[key] for row in rows]) for key in rows[0]}, outcome.classes
    )
    above, below = figure.axes[: len(shown)], figure.axes[2 * len(shown) :]
    for top, bottom, one in zip(above, below, shown, strict=True):
        top.set_title(f"image {int(outcome.index[one.number])}\n{top.get_title()}", fontsize=9)
        bottom.set_xlabel(f"{one.attack}\n{_fate(outcome, one)}", fontsize=8)
    return figure


def _fate(outcome: Outcome, one: Shown) -> str:
    """Two lines."""
    if one.margin is not None:
        return f"held at ≤ {exact(outcome.suite.eps_255[-1])}/255\nmargin left {one.margin:.3g}"
    summary = outcome.report.attacks[one.attack]
    distance, needed = 255 * float(summary.distance[one.number]), int(summary.steps[one.number])
    return (
        f"fell at {exact(one.fell_at_255)}/255\nat {distance:.3g}/255, {needed} "
        f"question{'s' * (needed != 1)}"
    )


def _example(outcome: Outcome, one: Shown) -> dict[str, torch.Tensor]:
    summary = outcome.report.attacks[one.attack]
    assert summary.adversarial is not None
    place = outcome.index[one.number]
    return {
        "clean": outcome.images[place],
        "adversarial": summary.adversarial[one.number],
        "label": outcome.labels[place],
        "prediction": summary.prediction[one.number],
    }
