"""Robust accuracy against eps, as a picture and in words. Between radii a curve joins what was
measured; from the clean images, where nothing was measured between, a thin dotted line alone leads
to the smallest radius. A single radius has points with error bars and no curve."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.bench.common.radii import exact
from ironmoe.bench.reports.style import STYLE

# so that curves that lie on each other can be told apart
LINES = ("o-", "s--", "^-.", "D:", "v--", "P-.", "*-")
LARGEST, SMALLEST = 9.0, 4.0  # marks: the first curve's show under those of later curves
MOST_INSIDE = 5  # entries of a legend inside the picture
CLEAN = "#4a5560"
Color = str | tuple[float, float, float, float]


class Point(NamedTuple):
    """Shares in [0, 1]: what was measured at one eps (in units of 1/255; 0: clean) and the two ends
    of its interval.

    least: the share that would be left if all that is undecided fell; None where nothing is.
    """

    eps_255: float
    share: float
    low: float
    high: float
    least: float | None = None


class Series(NamedTuple):
    """What one curve shows. clean: None where another series shows the same; band: whether the
    interval is drawn around the curve."""

    name: str
    color: Color
    clean: Point | None
    points: Sequence[Point]
    band: bool = True


def draw_robust_accuracy(
    series: Sequence[Series], *, distance: str, clean_of_all: Point | None = None
) -> Figure:
    """The picture.

    Args:
        distance: what the axis of eps says: norm and unit.
        clean_of_all: the clean accuracy, where it is that of all series.
    """
    eps = sorted({point.eps_255 for one in series for point in one.points})
    with plt.rc_context(STYLE):
        if len(eps) == 1:
            return _points(series, eps[0], distance, clean_of_all)
        return _curves(series, eps, distance, clean_of_all)


def series_in_words(series: Sequence[Series], clean_of_all: Point | None = None) -> str:
    """The numbers of the picture."""
    parts = [] if clean_of_all is None else [f"Clean {_percent(clean_of_all)}."]
    for one in series:
        clean = "" if one.clean is None else f"clean {_percent(one.clean)}, "
        at = ", ".join(f"{_percent(point)} at {exact(point.eps_255)}/255" for point in one.points)
        parts.append(f"{one.name}: {clean}{at}.")
    return " ".join(parts)


def _percent(point: Point) -> str:
    return f"{'at most ' * (point.least is not None)}{100 * point.share:.1f} %"


def _curves(
    series: Sequence[Series], eps: Sequence[float], distance: str, clean_of_all: Point | None
) -> Figure:
    figure, axes = plt.subplots(figsize=(6.8, 4.2))
    if clean_of_all is not None:
        _bar(axes, 0, clean_of_all, CLEAN, "o")
    sizes = np.linspace(LARGEST, SMALLEST, max(2, len(series))).tolist()
    for one, style, size in zip(series, cycle(LINES), sizes, strict=False):
        _curve(axes, one, style, size if len(series) > 1 else SMALLEST, clean_of_all)

    axes.set(xlabel=f"eps: {distance} (0: clean)", ylabel="robust accuracy in %", ylim=(-1, 101))
    axes.set_xticks([0, *eps], ["0", *map(exact, eps)])
    _legend(axes)
    return figure


def _curve(axes: Axes, one: Series, style: str, size: float, clean_of_all: Point | None) -> None:
    """Where images are undecided, the line is the upper end of what is possible, and hatching
    reaches down to the lower end."""
    x = [point.eps_255 for point in one.points]
    shares = [100 * point.share for point in one.points]
    look: dict[str, Any] = {"color": one.color, "markersize": size, "linewidth": size / 2.7}
    axes.plot(x, shares, style, label=one.name, **look)

    if any(point.least is not None for point in one.points):
        least = [100 * (p.share if p.least is None else p.least) for p in one.points]
        axes.plot(x, least, linestyle=(0, (1, 2)), color=one.color, linewidth=1)
        hatched: dict[str, Any] = {"facecolor": "none", "edgecolor": one.color, "hatch": "///"}
        axes.fill_between(x, least, shares, alpha=0.5, linewidth=0, **hatched)
    elif one.band:
        low, high = [100 * p.low for p in one.points], [100 * p.high for p in one.points]
        axes.fill_between(x, low, high, color=one.color, alpha=0.15, linewidth=0)

    clean = one.clean or clean_of_all
    if one.clean is not None:
        _bar(axes, 0, one.clean, one.color, style[0], size)
    if clean is not None:
        ends = [100 * clean.share, shares[0]]
        axes.plot([0, x[0]], ends, ":", color=one.color, linewidth=0.9)


def _points(
    series: Sequence[Series], eps: float, distance: str, clean_of_all: Point | None
) -> Figure:
    """A line for each point, with its name beside it."""
    shown: list[tuple[str, Point, Color, str]] = []
    if clean_of_all is not None:
        shown.append(("clean", clean_of_all, CLEAN, "o"))
    for one, style in zip(series, cycle(LINES), strict=False):
        if one.clean is not None:
            shown.append((f"{one.name}, clean", one.clean, CLEAN, style[0]))
        shown.append((one.name, one.points[0], one.color, style[0]))

    figure, axes = plt.subplots(figsize=(6.8, 1.2 + 0.42 * len(shown)))
    for place, (_, point, color, marker) in enumerate(shown):
        _bar(axes, place, point, color, marker, across=True)
        text = f"{'≤ ' * (point.least is not None)}{100 * point.share:.1f}"
        axes.annotate(
            text,
            (100 * point.share, place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(shown)), [name for name, *_ in shown])
    axes.set(
        xlabel=f"accuracy in %, under attack at eps {exact(eps)} ({distance})",
        xlim=(-3, 103),
        ylim=(len(shown) - 0.5, -0.7),
    )
    return figure


def _bar(
    axes: Axes,
    place: float,
    point: Point,
    color: Color,
    marker: str,
    size: float = 6,
    *,
    across: bool = False,
) -> None:
    """A point with its interval, upright or across. A hollow mark is an upper end: something is
    undecided."""
    share, low, high = (100 * value for value in point[1:4])
    ends = [[max(0.0, share - low)], [max(0.0, high - share)]]
    look: dict[str, Any] = {"color": color, "markersize": size, "capsize": 4, "linewidth": 1.6}
    if point.least is not None:
        look["markerfacecolor"] = "none"
    if across:
        axes.errorbar([share], [place], xerr=ends, fmt=marker, **look)
    else:
        axes.errorbar([place], [share], yerr=ends, fmt=marker, **look)


def _legend(axes: Axes) -> None:
    """Beside the picture where it has many lines."""
    if len(axes.get_legend_handles_labels()[1]) > MOST_INSIDE:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.legend(fontsize=8)
