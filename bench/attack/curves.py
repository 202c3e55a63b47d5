"""The curves of ``ironmoe attack``: robust accuracy, distances, steps to success."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from ironmoe.bench.attack.outcome import EvaluationOutcome
from ironmoe.bench.attack.rows import WORST_CASE, RobustnessRow
from ironmoe.bench.common.radii import to_255
from ironmoe.bench.reports.robust_accuracy import (
    LINES,
    Color,
    Point,
    Series,
    draw_robust_accuracy,
)
from ironmoe.bench.reports.style import COLORS, STYLE

WORST = "#1c2329"  # the color of the worst case per sample
BINS = 40
BIN_SHIFT = 1e-5  # so that all distances of just eps are counted in the same bin


def accuracy_series(outcome: EvaluationOutcome) -> list[Series]:
    """A series for each attack that decided something, and one for the worst case."""
    attacks = list(outcome.report.attacks)
    band = not many_attacks(outcome)
    series = [
        Series(name, color, None, [_point(r) for r in outcome.rows if r.attack == name], band)
        for name, color in zip(attacks, _colors(outcome), strict=True)
        if outcome.decided_something(name)
    ]
    if len(attacks) > 1:
        worst = [_point(row) for row in outcome.worst_rows]
        series.append(Series(WORST_CASE, WORST, None, worst))
    return series


def clean_point(outcome: EvaluationOutcome) -> Point:
    """Accuracy on clean images."""
    clean = outcome.report.clean_accuracy
    return Point(0.0, clean.value, *clean.interval())


def accuracy(outcome: EvaluationOutcome) -> Figure:
    """Robust accuracy against eps: one curve for each attack, and one for the worst case."""
    return draw_robust_accuracy(
        accuracy_series(outcome),
        distance=distance_label(outcome.suite.norm),
        clean_of_all=clean_point(outcome),
    )


def _point(row: RobustnessRow) -> Point:
    least = row.least if row.undecided else None
    return Point(row.eps_255, row.robust.value, *row.interval, least)


def distances(outcome: EvaluationOutcome) -> Figure:
    """Histograms of the distances of adversarial images, one for each attack that found
    something."""
    found = {name: to_255(s.distance[s.fell].numpy()) for name, s in outcome.report.attacks.items()}
    colors = dict(zip(found, _colors(outcome), strict=True))
    found = {name: values for name, values in found.items() if len(values)}
    top = max(values.max() for values in found.values()) or 1.0
    bins = np.linspace(0, top, BINS + 1).tolist()

    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(found),
            sharex=True,
            sharey=True,
            squeeze=False,
            figsize=(6.8, max(2.4, 0.6 + 1.3 * len(found))),
        )

        for axes, (name, values) in zip(grid[:, 0], found.items(), strict=True):
            axes.hist(values * (1 - BIN_SHIFT), bins, color=colors[name])
            for eps in outcome.suite.eps_255:
                if eps <= 1.02 * top:
                    axes.axvline(eps, color=WORST, linewidth=0.8, linestyle=":")
            axes.set(ylabel="images", xlim=(0, 1.02 * top))
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_title(
                f"{name}: {len(values)} images, median {np.median(values):.3g}",
                loc="left",
                fontsize=9,
            )

        grid[-1, 0].set_xlabel(f"distance: {distance_label(outcome.suite.norm)}")

    return figure


def steps(outcome: EvaluationOutcome) -> Figure:
    """How many queries to the model an image took to fall: for each attack, the share of the images
    that had fallen after so many queries.

    A curve ends at the longest attempt that its attack allows. Images that are wrong from the start
    do not count.
    """
    ends = {
        name: outcome.max_queries(name)
        for name in outcome.report.attacks
        if outcome.decided_something(name)
    }
    last = max(ends.values())

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.8, 3.6))
        for (name, summary), color, style in zip(
            outcome.report.attacks.items(), _colors(outcome), cycle(LINES), strict=False
        ):
            if name not in ends:
                continue

            needed = summary.steps[summary.fell].sort().values.numpy()
            share = 100 * np.arange(len(needed) + 1) / int(summary.clean_correct.sum())
            label = f"{name} (median {np.median(needed):.3g})" if len(needed) else name
            axes.step(
                [0, *needed, ends[name]],
                [*share, share[-1]],
                where="post",
                color=color,
                label=label,
                linestyle=style[1:],
            )
            axes.plot([ends[name]], [share[-1]], "|", color=color, markersize=12, markeredgewidth=2)

        axes.set(xlabel="questions to the model in the successful attempt (0: its starting point)")
        axes.set(ylabel="images that fell, in %", ylim=(0, 101))

        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(-0.1, 1.15 * last + 0.1)
        axes.set_xticks(_ticks(set(ends.values())))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", labelsize=8)

        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return figure


def _ticks(ends: set[int]) -> list[int]:
    """The ticks of the axis of queries: 0, the ends of the curves, and of 1, 2, 5, 10, … those
    below the last end.

    Where two would be printed over each other, the end stays, or the larger one of two ends.
    """
    usual = [digit * 10**size for size in range(len(str(max(ends)))) for digit in (1, 2, 5)]
    ticks: list[int] = []
    for tick in [*sorted(ends, reverse=True), *(tick for tick in usual if tick < max(ends))]:
        if tick and all(max(tick, other) > 1.4 * min(tick, other) for other in ticks):
            ticks.append(tick)
    return sorted([0, *ticks])


def distance_label(norm: str) -> str:
    """What an axis of distances in this norm says: the norm and the unit."""
    return f"{norm}, in 1/255 of the pixel range"


def _colors(outcome: EvaluationOutcome) -> list[Color]:
    count = len(outcome.report.attacks)
    if not many_attacks(outcome):
        return list(COLORS[:count])
    return [plt.get_cmap("tab10" if count <= 10 else "tab20")(number) for number in range(count)]


def many_attacks(outcome: EvaluationOutcome) -> bool:
    """Whether there are more attacks than the usual colours and bands can tell apart."""
    return len(outcome.report.attacks) > len(COLORS)
