"""Thin lines are runs, thick ones their means."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ironmoe.bench.study.report.figures.parts.looks import Look

RUN, MEAN = "run", "mean"
"""The gid of lines."""


def run_lines(
    axes: Axes, x: Sequence[float], by_seed: Mapping[int, Sequence[float]], look: Look
) -> bool:
    """A thin line for each seed, and a thick one for the mean of the seeds that have every number:
    a mean over other seeds at each place would rise and fall with the seeds.

    Args:
        x: at least one place.
        by_seed: one number for each place, NaN where there is none.

    Returns:
        Whether there was any number.
    """
    rows = {seed: np.array(row, np.float64) for seed, row in by_seed.items()}
    rows = {seed: row for seed, row in rows.items() if np.isfinite(row).any()}
    if not rows:
        return False

    whole = [row for row in rows.values() if np.isfinite(row).all()]
    names = [look.label * (not whole and place == 0) for place in range(len(rows))]
    for row, label in zip(rows.values(), names, strict=True):
        thin: dict[str, Any] = {"marker": "."} if np.isfinite(row).sum() == 1 else {}
        axes.plot(
            x, row, color=look.color, linewidth=0.7, alpha=0.4, gid=RUN, label=label or None, **thin
        )
    if whole:
        axes.plot(
            x,
            np.mean(whole, axis=0),
            color=look.color,
            linewidth=look.width,
            linestyle=look.dashes,
            marker=look.marker,
            markersize=look.size,
            markerfacecolor="none",
            gid=MEAN,
            label=look.label,
        )
    return True
