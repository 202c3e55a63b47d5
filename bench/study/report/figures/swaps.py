"""How near the next change of an expert is, and how far the logits jump there."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.claims.parts.ladders import deciding_arm
from ironmoe.bench.study.claims.parts.words import listed
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.parts.captions import (
    between,
    in_trainings,
    means,
    sentences,
    thin_and_thick,
)
from ironmoe.bench.study.report.figures.parts.clouds import cloud, known_pairs
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.groups import few, on_ladders
from ironmoe.bench.study.report.figures.parts.ladders import Outcome, over_experts
from ironmoe.bench.study.report.figures.parts.lines import run_lines
from ironmoe.bench.study.report.figures.parts.log_axis import log_axis
from ironmoe.bench.study.report.figures.parts.looks import Look, looks
from ironmoe.bench.study.report.figures.parts.panels import Panel, draw_panels
from ironmoe.bench.study.report.runs import StudyRuns

DISTANCE = Outcome("swap", "nearest swap in 1/255 (Linf)")
JUMP = Outcome("jump", "jump of the logits (L2)", is_log=True)
PLACES = 120  # of a curve


def draw(runs: StudyRuns) -> Figure | None:
    """A line of panels for each training."""
    arm = deciding_arm(runs.arms, at_any_cost=True)
    if arm is None:
        return None
    return draw_panels(
        [
            [
                Panel(f"{training}: images with a swap", partial(_distances, runs, training)),
                Panel(
                    f"{training}: jump at the swap",
                    partial(over_experts, runs=runs, training=training, outcome=JUMP),
                ),
                Panel(f"{training}: images of {arm.name}", partial(_cloud, runs, training, arm)),
            ]
            for training in runs.trainings
        ]
    )


def _distances(runs: StudyRuns, training: str, axes: Axes) -> bool:
    arms = few(runs.arms)
    found = {arm: runs.images(training, arm, DISTANCE.key) for arm in arms}
    every = np.array([v for rows in found.values() for row in rows.values() for v in row])
    known = every[np.isfinite(every) & (every > 0)]
    if not len(known):
        return False

    places = np.geomspace(known.min() / 1.2, known.max() * 1.2, PLACES).tolist()
    for arm, look in zip(arms, looks(arms).values(), strict=True):
        rows = {seed: share_within(row, places) for seed, row in found[arm].items() if row}
        run_lines(axes, places, rows, look._replace(marker=""))
    log_axis(axes, "x")
    axes.set(xlabel="radius in 1/255 (Linf)", ylabel="images with a swap within, in %")
    return True


def share_within(distances: Sequence[float], places: Sequence[float]) -> list[float]:
    """The share of images, in %, that are at most this far from a swap; NaN is an image without
    any."""
    known = np.sort([value for value in distances if np.isfinite(value)])
    counts = np.searchsorted(known, places, side="right")
    return (100 * counts / len(distances)).tolist()


def _cloud(runs: StudyRuns, training: str, arm: Arm, axes: Axes) -> bool:
    x, y = (runs.images(training, arm, key) for key in (DISTANCE.key, JUMP.key))
    axes.set(xlabel=DISTANCE.label, ylabel=JUMP.label)
    look: Look = looks([arm])[arm.name]._replace(label="", width=2.6, size=7.0)
    return cloud(axes, {seed: known_pairs(x[seed], y[seed]) for seed in x if seed in y}, look)


def caption(runs: StudyRuns) -> str:
    """What is drawn, the median distances, and the jumps beside the slopes."""

    def numbers(training: str) -> str:
        distances = means(runs, training, few(runs.arms), DISTANCE.key)
        swapping = [arm for arm in on_ladders(runs.arms) if arm.experts != arm.top_k]
        jumps = means(runs, training, swapping, JUMP.key)
        texts = []
        if distances:
            texts.append(f"median distances are {between(distances, 3)} in 1/255, mean over runs")
        if jumps:
            texts.append(f"mean jumps {between(jumps, 3)}")
        return ", ".join(texts)

    images = counted(runs.image_count(DISTANCE.key), "image")
    return sentences(
        f"Left: the share of {images} within this Linf distance of an image at which, to first "
        "order, some token changes an expert (logarithmic axis). Middle: how far the logits jump "
        "there, by two forced passes, mean over images; 0 has no place on the axis. Right: both of "
        "each image (dots; lines: geometric means of fifths of a run's images).",
        thin_and_thick(runs),
        f"Left: {listed([arm.name for arm in few(runs.arms)])}.",
        in_trainings(runs, numbers),
    )


SWAPS = StudyFigure(
    name="swaps",
    title="Swaps of experts and their jumps",
    needs=("swap", "jump"),
    of_experts=True,
    draw=draw,
    caption=caption,
)
