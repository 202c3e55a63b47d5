"""Two numbers of each image: faint dots, and lines through them for each run."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ironmoe.bench.study.report.figures.parts.lines import MEAN, RUN
from ironmoe.bench.study.report.figures.parts.log_axis import log_axis
from ironmoe.bench.study.report.figures.parts.looks import Look

BINS = 5
FEWEST_IN_A_BIN = 2
Array = NDArray[np.float64]


def known_pairs(x: Sequence[float], y: Sequence[float]) -> tuple[Array, Array]:
    """Of the first images, of which both lists have a number, those with two positive ones: the
    axes are logarithmic."""
    count = min(len(x), len(y))
    pairs = np.array([x[:count], y[:count]], np.float64)
    known = np.isfinite(pairs).all(0) & (pairs > 0).all(0)
    return pairs[0, known], pairs[1, known]


def cloud(axes: Axes, by_seed: Mapping[int, tuple[Array, Array]], look: Look) -> bool:
    """A dot for each image of each run; a thin line for each run through the geometric means of
    fifths of its images, ordered by x; a thick one through their means over runs. Returns whether
    there was anything to draw."""
    by_seed = {seed: pairs for seed, pairs in by_seed.items() if len(pairs[0])}
    lines = []
    for x, y in by_seed.values():
        axes.plot(x, y, ".", color=look.color, alpha=0.15, markersize=4)
        if len(x) >= BINS * FEWEST_IN_A_BIN:
            lines.append(_through_fifths(x, y))
            axes.plot(*lines[-1], color=look.color, linewidth=0.8, alpha=0.6, gid=RUN)
    if lines:
        middle = np.exp(np.mean(np.log(lines), axis=0))
        axes.plot(
            *middle,
            color=look.color,
            linewidth=look.width,
            marker=look.marker,
            markersize=look.size,
            markerfacecolor="none",
            gid=MEAN,
            label=look.label,
        )
    if by_seed:
        log_axis(axes, "x")
        log_axis(axes, "y")
    return bool(by_seed)


def _through_fifths(x: Array, y: Array) -> Array:
    """(2, BINS) geometric means."""
    order = np.argsort(x, kind="stable")
    parts = np.array_split(order, BINS)
    return np.array([[np.exp(np.log(axis[part]).mean()) for part in parts] for axis in (x, y)])
