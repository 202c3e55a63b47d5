"""The error over the radius at equal cost: under PGD, and under the paper's attack."""

from functools import partial
from math import nan

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.bench.common.radii import exact
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.parts.captions import (
    between,
    in_trainings,
    means,
    same_cost,
    sentences,
    thin_and_thick,
)
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.groups import Group, at_equal_cost
from ironmoe.bench.study.report.figures.parts.lines import run_lines
from ironmoe.bench.study.report.figures.parts.looks import looks
from ironmoe.bench.study.report.figures.parts.panels import Panel, draw_panels
from ironmoe.bench.study.report.runs import StudyRuns

PGD, PAPERS = "pgd", "vmoe"
CLIPPED = "vmoe-clipped"  # the same images inside the pixel range
OUTSIDE = (
    "As in the official code its images leave the pixel range, so it may find errors that no image "
    "has and that no other attack here looks for."
)


def draw(runs: StudyRuns, attack: str) -> Figure | None:
    """A panel for each training and kind of gates."""
    groups = at_equal_cost(runs.arms)
    return draw_panels(
        [
            [
                Panel(f"{training}: {group.title}", partial(_panel, runs, training, group, attack))
                for group in groups
            ]
            for training in runs.trainings
        ],
        same_heights=True,
    )


def _panel(runs: StudyRuns, training: str, group: Group, attack: str, axes: Axes) -> bool:
    radii = runs.radii(training, attack)
    of_arm = looks(group.arms)
    drawn = False
    for arm in group.arms:
        columns = [runs.values(training, arm, f"{attack}@{exact(radius)}") for radius in radii]
        seeds = sorted({seed for column in columns for seed in column})
        clean = _clean_of_sample(runs, training, arm, attack)
        errors = {
            seed: [100 * (1 - column.get(seed, nan)) for column in [clean, *columns]]
            for seed in seeds
        }
        start = 0 if any(np.isfinite(row[0]) for row in errors.values()) else 1
        rows = {seed: row[start:] for seed, row in errors.items()}
        drawn = run_lines(axes, [0.0, *radii][start:], rows, of_arm[arm.name]) or drawn

    axes.set(xlabel="radius eps in 1/255 (Linf; 0: clean)", ylabel="error in %")
    axes.set_xticks([0.0, *radii], ["0", *map(exact, radii)])
    return drawn


def _clean_of_sample(runs: StudyRuns, training: str, arm: Arm, attack: str) -> dict[int, float]:
    """Accuracy on the clean images that the attack met; other images would bend the curve."""
    images = runs.image_count(PGD) if attack == PGD else runs.budget(training).paper_images
    clean = runs.images(training, arm, "clean")
    return {seed: float(np.mean(row[:images])) for seed, row in clean.items() if row}


def caption(runs: StudyRuns, attack: str) -> str:
    """What the attack is, and where the means lie at the one radius."""

    beside = [(CLIPPED, "on the same images cut off at the pixel range")] * (attack == PAPERS)

    def errors(training: str) -> str:
        radius = exact(runs.budget(training).radius)
        texts = []
        for name, what in ((attack, "mean errors are"), *beside):
            found = means(runs, training, _drawn_arms(runs), f"{name}@{radius}", 100)
            wrong = {arm: 100 - right for arm, right in found.items()}
            if wrong:
                texts.append(f"{what} {between(wrong, unit=' %')}")
        return f"at {radius}/255 {', '.join(texts)}" if texts else ""

    return sentences(
        f"The share of images that a model gets wrong under {_attack(runs, attack)}, over the "
        "radius.",
        OUTSIDE if attack == PAPERS else "",
        same_cost(runs, _drawn_arms(runs)),
        thin_and_thick(runs),
        in_trainings(runs, errors),
    )


def _drawn_arms(runs: StudyRuns) -> list[Arm]:
    drawn = {arm for group in at_equal_cost(runs.arms) for arm in group.arms}
    return [arm for arm in runs.arms if arm in drawn]


def _attack(runs: StudyRuns, attack: str) -> str:
    budget = runs.budget(runs.trainings[0])
    if attack == PGD:
        images = counted(runs.image_count(PGD), "image")
        return f"PGD with {counted(budget.steps, 'step')} on {images}"
    return f"the paper's attack, PGD.vmoe with 40 steps, on {counted(budget.paper_images, 'image')}"


UNDER_PGD = StudyFigure(
    name="error-over-eps",
    title="Error over eps at equal cost",
    needs=("pgd",),
    of_experts=False,
    draw=partial(draw, attack=PGD),
    caption=partial(caption, attack=PGD),
)
UNDER_THE_PAPERS_ATTACK = StudyFigure(
    name="error-over-eps-paper",
    title="Error over eps at equal cost, under the attack of the paper",
    needs=("vmoe",),
    of_experts=False,
    draw=partial(draw, attack=PAPERS),
    caption=partial(caption, attack=PAPERS),
)
