"""A number over the number of experts E, or over how many a token takes, K."""

from collections.abc import Callable, Mapping, Sequence
from math import log2
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.bench.reports.style import COLORS
from ironmoe.bench.study.claims.parts.ladders import (
    choice_ladder,
    dense_arm,
    expert_ladder,
    reference_arm,
)
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.parts.groups import GATES
from ironmoe.bench.study.report.figures.parts.lines import MEAN, run_lines
from ironmoe.bench.study.report.figures.parts.log_axis import log_axis
from ironmoe.bench.study.report.figures.parts.looks import BLACK, Look
from ironmoe.bench.study.report.figures.parts.panels import Panel, draw_panels
from ironmoe.bench.study.report.runs import StudyRuns

DENSE_LOOK = Look("dense", BLACK, "X", 9.0, (0, (1, 1)), 1.6)
LOOKS = {
    (False, False): Look("", COLORS[0], "o", 9.0, "-", 3.0),
    (True, False): Look("", COLORS[1], "s", 6.0, "--", 1.8),
    (False, True): Look("", COLORS[0], "^", 7.0, (0, (5, 1, 1, 1)), 2.2),
    (True, True): Look("", COLORS[1], "D", 4.0, (0, (1, 1)), 1.4),
}
"""By (gates that sum to 1, equal width)."""


class Outcome(NamedTuple):
    """What an axis shows. key: the name of the number; label: of the axis, with its unit; scale:
    what the number is multiplied by; is_log: whether ratios are what counts."""

    key: str
    label: str
    scale: float = 1.0
    is_log: bool = False


def ladder_figure(
    runs: StudyRuns,
    outcomes: Callable[[str], Mapping[str, Outcome]],
    over: Callable[[Axes, StudyRuns, str, Outcome], bool],
) -> Figure | None:
    """A line of panels for each training, one panel for each of its outcomes.

    outcomes: from a training to title → outcome; over: ``over_experts`` or ``over_choices``.
    """

    def panel(training: str, title: str, outcome: Outcome) -> Panel:
        return Panel(f"{training}: {title}", lambda axes: over(axes, runs, training, outcome))

    return draw_panels(
        [
            [panel(training, title, outcome) for title, outcome in outcomes(training).items()]
            for training in runs.trainings
        ]
    )


def over_experts(axes: Axes, runs: StudyRuns, training: str, outcome: Outcome) -> bool:
    """A number over E at equal cost, a line for each kind of gates; the dense arm on the left, with
    its mean across. Returns whether there was anything to draw."""
    places: dict[int, float] = {}
    drawn = False
    for renormalize, gates in GATES.items():
        ladder = expert_ladder(runs.arms, renormalize=renormalize)
        if not any(arm.renormalize == renormalize for arm in ladder):
            continue
        ladder = [arm for arm in ladder if _shown(runs, training, arm, outcome)]
        x = {arm.experts: log2(arm.experts) for arm in ladder}
        look = LOOKS[renormalize, False]._replace(label=gates)
        if _ladder_lines(axes, runs, training, ladder, list(x.values()), outcome, look):
            places |= x
            drawn = True

    ticks = {str(count): place for count, place in sorted(places.items())}
    dense = dense_arm(runs.arms)
    if dense is not None:
        left = min(ticks.values(), default=1.0) - 1
        if _ladder_lines(axes, runs, training, [dense], [left], outcome, DENSE_LOOK):
            ticks = {"dense": left} | ticks
            drawn = True
            _across(axes)
    _axes(axes, ticks, "experts E", outcome)
    return drawn


def over_choices(axes: Axes, runs: StudyRuns, training: str, outcome: Outcome) -> bool:
    """A number over K, a line for each kind of gates and for equal cost and equal width. Returns
    whether there was anything to draw."""
    places: dict[int, float] = {}
    for (renormalize, equal_width), style in LOOKS.items():
        declared = choice_ladder(runs.arms, renormalize=renormalize, equal_width=equal_width)
        ladder = [arm for arm in declared if arm.top_k and _shown(runs, training, arm, outcome)]
        if len(ladder) < 2:
            continue
        x = {arm.top_k: log2(arm.top_k) for arm in ladder}
        cost = "equal width" if equal_width else "equal cost"
        look = style._replace(label=f"{GATES[renormalize]}, {cost}")
        if _ladder_lines(axes, runs, training, ladder, list(x.values()), outcome, look):
            places |= x
    middle = reference_arm(runs.arms, renormalize=False)
    experts = "" if middle is None else f", of E = {middle.experts}"
    ticks = {str(count): place for count, place in sorted(places.items())}
    _axes(axes, ticks, f"experts of a token K{experts}", outcome)
    return bool(places)


def _shown(runs: StudyRuns, training: str, arm: Arm, outcome: Outcome) -> dict[int, float]:
    """Seed → a number that has a place on the axis."""
    found = runs.values(training, arm, outcome.key)
    return {seed: outcome.scale * x for seed, x in found.items() if x > 0 or not outcome.is_log}


def _ladder_lines(
    axes: Axes,
    runs: StudyRuns,
    training: str,
    ladder: Sequence[Arm],
    x: Sequence[float],
    outcome: Outcome,
    look: Look,
) -> bool:
    columns = [_shown(runs, training, arm, outcome) for arm in ladder]
    seeds = sorted({seed for column in columns for seed in column})
    by_seed = {seed: [column.get(seed, np.nan) for column in columns] for seed in seeds}
    return bool(x) and run_lines(axes, x, by_seed, look)


def _across(axes: Axes) -> None:
    """The mean of the dense arm, which was drawn last, across the panel."""
    means = [line for line in axes.lines if line.get_gid() == MEAN]
    height = float(np.asarray(means[-1].get_ydata())[0])
    axes.axhline(height, color=BLACK, linewidth=0.8, linestyle=":")


def _axes(axes: Axes, ticks: dict[str, float], label: str, outcome: Outcome) -> None:
    axes.set(xlabel=label, ylabel=outcome.label)
    if ticks:
        axes.set_xticks(list(ticks.values()), list(ticks))
        axes.set_xlim(min(ticks.values()) - 0.4, max(ticks.values()) + 0.4)
    if ticks and outcome.is_log:
        log_axis(axes, "y")
