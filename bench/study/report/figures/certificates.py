"""Certified accuracy of the smoothed models over the radius."""

from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.report.figures.parts.captions import (
    between,
    in_trainings,
    means,
    sentences,
    thin_and_thick,
)
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.groups import Group, at_equal_cost
from ironmoe.bench.study.report.figures.parts.lines import run_lines
from ironmoe.bench.study.report.figures.parts.looks import looks
from ironmoe.bench.study.report.figures.parts.panels import Panel, draw_panels
from ironmoe.bench.study.report.runs import StudyRuns

RADIUS = "certified radius"
PLACES = 100  # of a curve


def draw(runs: StudyRuns) -> Figure | None:
    """A panel for each training and kind of gates."""
    return draw_panels(
        [
            [
                Panel(f"{training}: {group.title}", partial(_panel, runs, training, group))
                for group in at_equal_cost(runs.arms)
            ]
            for training in runs.trainings
        ],
        same_heights=True,
    )


def _panel(runs: StudyRuns, training: str, group: Group, axes: Axes) -> bool:
    found = {arm: runs.images(training, arm, RADIUS) for arm in group.arms}
    every = [radius for rows in found.values() for row in rows.values() for radius in row]
    if max(every, default=0) <= 0:
        return False
    places = np.linspace(0, 1.05 * max(every), PLACES).tolist()
    for arm, look in zip(group.arms, looks(group.arms).values(), strict=True):
        rows = {
            seed: [100 * float(np.mean([0 < r >= place for r in row])) for place in places]
            for seed, row in found[arm].items()
            if row
        }
        run_lines(axes, places, rows, look._replace(marker=""))
    axes.set(xlabel="certified radius (L2, pixel range 1)", ylabel="certified accuracy in %")
    return True


def caption(runs: StudyRuns) -> str:
    """What is certified, and the mean radii."""

    def radii(training: str) -> str:
        arms = [arm for arm in runs.arms if not arm.equal_width]
        found = means(runs, training, arms, RADIUS)
        return f"mean certified radii are {between(found, 3)}" if found else ""

    budget = runs.budget(runs.trainings[0])
    return sentences(
        f"The share of {counted(runs.image_count(RADIUS), 'image')} that the smoothed model (noise "
        f"of {budget.sigma:g} of the pixel range) gets right at every point within the radius, "
        f"proved with {budget.samples} noisy copies each. It says nothing of the model without "
        "noise.",
        thin_and_thick(runs),
        in_trainings(runs, radii),
    )


CERTIFICATES = StudyFigure(
    name="certificates",
    title="Certified accuracy of the smoothed models",
    needs=(RADIUS,),
    of_experts=False,
    draw=draw,
    caption=caption,
)
