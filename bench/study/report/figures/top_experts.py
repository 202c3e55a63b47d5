"""How different the top experts are, against robustness: of images of a model, and of models."""

from collections.abc import Iterable
from functools import partial
from math import isnan

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.claims.parts.ladders import deciding_arm, twin_arm
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.parts.captions import (
    in_trainings,
    sentences,
    spread_of,
    thin_and_thick,
)
from ironmoe.bench.study.report.figures.parts.clouds import cloud, known_pairs
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.lines import MEAN, RUN
from ironmoe.bench.study.report.figures.parts.looks import BLACK, Color, looks, shades
from ironmoe.bench.study.report.figures.parts.panels import Panel, draw_panels
from ironmoe.bench.study.report.runs import StudyRuns
from ironmoe.bench.study.statistics.correlation import rank_correlation

DISTANCE, RADIUS, AREA = "top_distance", "least_eps", "auc"
FEWEST = 3  # numbers of which there is a rank correlation, arms through which there is a line
HEIGHT = 3.0  # of a panel, in inches
Points = NDArray[np.float64]


def draw(runs: StudyRuns) -> Figure | None:
    """Within the reference arm and its twin, and between models."""
    return draw_panels(
        [
            [
                *(
                    Panel(
                        f"{training}: images of {arm.name}", partial(_within, runs, training, arm)
                    )
                    for arm in shown(runs)
                ),
                Panel(f"{training}: models", partial(_between, runs, training)),
            ]
            for training in runs.trainings
            if shown(runs)
        ],
        height=HEIGHT,
    )


def shown(runs: StudyRuns) -> list[Arm]:
    """Whose images are drawn."""
    arm = deciding_arm(runs.arms, at_any_cost=True)
    arms = [] if arm is None else [arm, twin_arm(runs.arms, arm)]
    return [each for each in arms if each is not None]


def _within(runs: StudyRuns, training: str, arm: Arm, axes: Axes) -> bool:
    axes.set(xlabel="distance of the two top experts", ylabel="least radius in 1/255 (Linf)")
    look = looks([arm])[arm.name]._replace(label="", width=2.6, size=7.0)
    return cloud(axes, of_images(runs, training, arm), look)


def of_images(runs: StudyRuns, training: str, arm: Arm) -> dict[int, tuple[Points, Points]]:
    """Seed → distances and least radii of the images that have both."""
    x, y = (runs.images(training, arm, key) for key in (DISTANCE, RADIUS))
    return {seed: known_pairs(x[seed], y[seed]) for seed in x if seed in y}


def _between(runs: StudyRuns, training: str, axes: Axes) -> bool:
    """Models around the mean of their seed, and a straight line for each seed."""
    color = shades(runs.arms)
    lines = []
    for points in of_models(runs, training).values():
        centre = np.mean(list(points.values()), axis=0)
        around = {arm: point - centre for arm, point in points.items()}
        for arm, point in around.items():
            marker = "s" if arm.renormalize else "o"
            _dot(axes, point, marker, color[arm.experts], f"E = {arm.experts}")
        if (slope := _slope(around.values())) is not None:
            ends = np.array(
                [min(p[0] for p in around.values()), max(p[0] for p in around.values())]
            )
            axes.plot(ends, slope * ends, color=BLACK, linewidth=0.7, alpha=0.5, gid=RUN)
            lines.append((slope, *ends))

    if lines:
        slope, *ends = np.mean(lines, axis=0)
        axes.plot(ends, slope * np.array(ends), color=BLACK, linewidth=2.6, gid=MEAN)
    axes.set(xlabel="distance − mean of its seed", ylabel="accuracy − mean of its seed, points")
    axes.locator_params(axis="x", nbins=4)
    return bool(axes.lines)


def of_models(runs: StudyRuns, training: str) -> dict[int, dict[Arm, Points]]:
    """Seed → arm → distance and accuracy in % of the models that have both, by number of
    experts."""
    found: dict[int, dict[Arm, Points]] = {}
    for arm in sorted(runs.arms, key=lambda arm: arm.experts):
        x, y = (runs.values(training, arm, key) for key in (DISTANCE, AREA))
        for seed in x.keys() & y.keys():
            found.setdefault(seed, {})[arm] = np.array([x[seed], 100 * y[seed]])
    return dict(sorted(found.items()))


def _dot(axes: Axes, point: Points, marker: str, color: Color, label: str) -> None:
    known = axes.get_legend_handles_labels()[1]
    axes.plot(
        *point[:, None],
        marker,
        color=color,
        markersize=4.5,
        markerfacecolor="none",
        label=None if label in known else label,
    )


def _slope(points: Iterable[Points]) -> float | None:
    """Of the straight line through points around (0, 0); None through fewer than three, or if all
    have one distance."""
    table = np.array(list(points))
    square = float(table[:, 0] @ table[:, 0])
    return float(table[:, 0] @ table[:, 1]) / square if len(table) >= FEWEST and square else None


def caption(runs: StudyRuns) -> str:
    """What the axes are, and the rank correlations within models."""

    def correlations(training: str) -> str:
        texts = []
        for arm in shown(runs):
            pairs = of_images(runs, training, arm).values()
            rho = [rank_correlation(x, y) for x, y in pairs if len(x) >= FEWEST]
            known = [value for value in rho if not isnan(value)]
            if known:
                texts.append(f"{arm.name} {spread_of(known, 2)}")
        return f"Spearman's ρ within models, mean and range: {'; '.join(texts)}" if texts else ""

    images = counted(min(runs.image_count(DISTANCE), runs.image_count(RADIUS)), "image")
    return sentences(
        "How far apart the outputs of a token's two top experts are, over the mean of their norms "
        "(0: equal, √2: orthogonal and of one length). Images: "
        f"against the least radius at which an attack found another class (dots: up to {images} a "
        "run; lines: geometric means of fifths of a run's images by distance). Models: mean "
        "distance against accuracy under attack, both around the mean of all models of the seed; "
        "circles have the gates of the source, squares gates that sum to 1; a thin line is the "
        "straight line through a seed's models, the thick one their mean.",
        thin_and_thick(runs),
        "Easy images may differ from hard ones in both numbers: the claim above takes their clean "
        "margin out, this figure does not.",
        in_trainings(runs, correlations),
    )


TOP_EXPERTS = StudyFigure(
    name="top-experts",
    title="Distance of the top experts against robustness",
    needs=(DISTANCE, RADIUS),
    of_experts=True,
    draw=draw,
    caption=caption,
)
