"""Numbers of named things, such as interventions: runs as thin strokes, means as thick ones."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from ironmoe.bench.common.statistics import spread, t_half_width
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.parts.lines import MEAN, RUN
from ironmoe.bench.study.report.figures.parts.log_axis import log_axis
from ironmoe.bench.study.report.figures.parts.looks import Look, looks

ROOM = 0.72  # of the distance between two names
Columns = Mapping[Arm, Mapping[str, Sequence[float]]]
"""Arm → name → a number of each run."""


def strokes(
    axes: Axes, names: Sequence[str], of_arms: Columns, *, is_log: bool = False, named: bool = True
) -> bool:
    """One row for each name; in it each arm has a stroke for each run, the arm's mark at the mean,
    and the 95 % t interval over runs as a line.

    is_log: means and intervals are those of logarithms, and numbers that are not above 0 are left
    out; named: whether the names stand beside the axis.

    Returns:
        Whether there was anything to draw.
    """
    look = looks(list(of_arms))
    shifts = np.linspace(-ROOM / 2, ROOM / 2, len(of_arms) + 2)[1:-1].tolist() if of_arms else []
    drawn = False
    for (arm, columns), shift in zip(of_arms.items(), shifts, strict=True):
        for place, name in enumerate(names):
            values = [x for x in columns.get(name, []) if np.isfinite(x) and (x > 0 or not is_log)]
            if values:
                _row(axes, values, place + shift, look[arm.name], is_log)
                drawn = True

    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names if named else [""] * len(names))
    axes.tick_params(axis="y", labelsize=8.5)
    if drawn and is_log:
        log_axis(axes, "x")
    return drawn


def _row(axes: Axes, values: Sequence[float], y: float, look: Look, is_log: bool) -> None:
    there: Callable[[float], float] = np.log if is_log else float
    back: Callable[[float], float] = np.exp if is_log else float
    mean, sd, count = spread([float(there(value)) for value in values])
    half = t_half_width(sd, count)

    axes.plot(values, [y] * count, "|", color=look.color, markersize=7, gid=RUN)
    if np.isfinite(half):
        ends = [back(mean - half), back(mean + half)]
        axes.plot(ends, [y, y], "-", color=look.color, linewidth=1.2)
    axes.plot(
        [back(mean)],
        [y],
        look.marker,
        color=look.color,
        markersize=6,
        markerfacecolor="none",
        markeredgewidth=2,
        gid=MEAN,
        label=look.label,
    )
