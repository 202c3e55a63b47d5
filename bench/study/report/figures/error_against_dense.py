"""How much more often than the dense model models with experts are wrong under attack."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ironmoe.bench.common.radii import exact
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.claims.parts.ladders import dense_arm
from ironmoe.bench.study.claims.parts.words import number
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.parts.captions import in_trainings, of_runs, sentences
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.groups import Group, at_equal_cost
from ironmoe.bench.study.report.figures.parts.lines import MEAN, RUN
from ironmoe.bench.study.report.figures.parts.looks import BLACK, Look, looks
from ironmoe.bench.study.report.figures.parts.panels import Panel, draw_panels
from ironmoe.bench.study.report.runs import StudyRuns
from ironmoe.bench.study.statistics.bootstrap import Interval, pigeonhole

ROOM = 0.7  # of the distance between two radii


def draw(runs: StudyRuns) -> Figure | None:
    """A panel for each training and kind of gates; None without a dense arm."""
    dense = dense_arm(runs.arms)
    if dense is None:
        return None
    return draw_panels(
        [
            [
                Panel(f"{training}: {group.title}", partial(_panel, runs, training, group, dense))
                for group in at_equal_cost(runs.arms)
            ]
            for training in runs.trainings
        ],
        same_heights=True,
    )


def _panel(runs: StudyRuns, training: str, group: Group, dense: Arm, axes: Axes) -> bool:
    radii = runs.radii(training, "pgd")
    arms = [arm for arm in group.arms if arm != dense]
    of_arm = looks(arms)
    shifts = np.linspace(-ROOM / 2, ROOM / 2, len(arms) + 2)[1:-1].tolist()
    drawn = False
    for arm, shift in zip(arms, shifts, strict=True):
        label = arm.name
        for place, radius in enumerate(radii):
            table = differences(runs, training, arm, dense, f"pgd@{exact(radius)}")
            if table is not None:
                look = of_arm[arm.name]._replace(label=label)
                _mark(axes, place + shift, table.mean(1).tolist(), pigeonhole(table), look)
                drawn, label = True, ""

    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set(xlabel="radius eps in 1/255 (Linf)", ylabel="error − error of dense, in points")
    axes.set_xticks(range(len(radii)), list(map(exact, radii)))
    axes.grid(visible=False, axis="x")
    return drawn


def differences(
    runs: StudyRuns, training: str, arm: Arm, dense: Arm, key: str
) -> NDArray[np.float64] | None:
    """(S, N) error of the arm − error of the dense one, in points, for the seeds of both and the
    images of all of these; None if there are none."""
    one, other = (runs.images(training, each, key) for each in (arm, dense))
    seeds = [seed for seed in one if seed in other]
    rows = [row for seed in seeds for row in (one[seed], other[seed])]
    count = min(map(len, rows), default=0)
    if not count:
        return None
    table = np.array([np.subtract(other[s][:count], one[s][:count]) for s in seeds])
    known = table[:, np.isfinite(table).all(0)]
    return 100 * known if known.shape[1] else None


def _mark(axes: Axes, x: float, of_runs: Sequence[float], found: Interval, look: Look) -> None:
    axes.plot([x] * len(of_runs), of_runs, "_", color=look.color, markersize=5, gid=RUN)
    if np.isfinite(found.low):
        axes.plot([x, x], [found.low, found.high], "-", color=look.color, linewidth=1.2)
    axes.plot(
        [x],
        [found.mean],
        look.marker,
        color=look.color,
        markersize=6,
        markerfacecolor="none",
        markeredgewidth=2,
        gid=MEAN,
        label=look.label or None,
    )


def caption(runs: StudyRuns) -> str:
    """What marks and lines are, and the differences at the one radius."""
    dense = dense_arm(runs.arms)

    def at_radius(training: str) -> str:
        found = []
        for arm in runs.arms:
            if dense is None or arm == dense or arm.equal_width:
                continue
            key = runs.at_radius(training, "pgd")
            table = differences(runs, training, arm, dense, key)
            if table is not None:
                found.append(f"{arm.name} {number(table.mean())}")
        radius = exact(runs.budget(training).radius)
        return f"at {radius}/255, in points: {', '.join(found)}" if found else ""

    images = counted(runs.image_count("pgd"), "image")
    return sentences(
        f"The error under PGD on {images} minus that of the dense model of the same seed: below 0 "
        f"the model with experts is wrong less often. Thin strokes are runs ({of_runs(runs)}), "
        "marks their means. Upright lines are 95 % intervals of the pigeonhole bootstrap, which "
        "draws seeds and images anew; they are for the eye, and with few seeds too short. Verdicts "
        "rest on the t intervals above.",
        in_trainings(runs, at_radius),
    )


ERROR_AGAINST_DENSE = StudyFigure(
    name="error-against-dense",
    title="Error against the dense model of the same seed",
    needs=("pgd",),
    of_experts=True,
    draw=draw,
    caption=caption,
    wants="model with experts and a dense one of the same seed",
)
