"""A figure of several panels: a line of them for each training, whose radii differ."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.bench.reports.style import STYLE

PANEL_STYLE = STYLE | {"axes.titlesize": 9, "axes.titlelocation": "left", "axes.labelsize": 9}
FULL_WIDTH, WIDEST_PANEL = 9.3, 4.65  # inches; a figure of full width is as wide as the page
LEGEND_LINE, LEGEND_GAP = 0.2, 0.52  # inches; the gap has the numbers and the label of the axis
FRAME = 0.75  # of a panel that its axes leave, in inches
CHARACTERS = 10  # of an inch
HANDLE = 8  # characters


class Panel(NamedTuple):
    """title: above it; draw: on these axes; returns whether there was anything to draw."""

    title: str
    draw: Callable[[Axes], bool]


def draw_panels(
    lines: Sequence[Sequence[Panel]],
    *,
    height: float = 2.6,
    same_heights: bool = False,
) -> Figure | None:
    """One figure with a line of panels for each of ``lines``, and all legends below. A panel
    without numbers says so, a line of such panels is left out; None if all are.

    height: of a panel, in inches; same_heights: whether panels of a line have one upright axis.
    """
    columns = max((len(line) for line in lines), default=0)
    if not columns:
        return None
    width = min(WIDEST_PANEL, FULL_WIDTH / columns)

    with plt.rc_context(PANEL_STYLE):
        figure, grid = plt.subplots(
            len(lines),
            columns,
            squeeze=False,
            figsize=(width * columns, height * len(lines)),
            sharey="row" if same_heights else False,
        )
        rows: list[list[Axes]] = grid.tolist()
        drawn = [_drawn(line, row) for line, row in zip(lines, rows, strict=True)]
        if any(drawn):
            _legends(figure, rows)

    if all(drawn):
        return figure
    plt.close(figure)
    rest = [line for line, has_numbers in zip(lines, drawn, strict=True) if has_numbers]
    return draw_panels(rest, height=height, same_heights=same_heights)


def _drawn(line: Sequence[Panel], row: Sequence[Axes]) -> bool:
    """Whether any panel of a line had something to draw."""
    found = False
    for place, axes in enumerate(row):
        if place >= len(line):
            axes.set_axis_off()
            continue
        axes.set_title(line[place].title)
        if line[place].draw(axes):
            found = True
            axes.set_ylabel(axes.get_ylabel() if _has_labels(axes) else "")
        else:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
    return found


def _has_labels(axes: Axes) -> bool:
    """Whether its upright axis has numbers beside it: those within a line that share one do not."""
    return bool(axes.yaxis.get_tick_params()["labelleft"])


def _legends(figure: Figure, rows: Sequence[Sequence[Axes]]) -> None:
    """Below the panels, where they hide nothing: one for all columns if it has the labels of each,
    else one below each column."""
    columns = [_labelled([row[place] for row in rows]) for place in range(len(rows[0]))]
    with_labels = [labelled for labelled in columns if len(labelled) > 1]
    if not with_labels:
        return

    width, height = figure.get_size_inches().tolist()
    labelled = max(with_labels, key=len)
    if all(other.keys() <= labelled.keys() for other in with_labels):
        beside = _beside(labelled, width)
        figure.set_figheight(height + LEGEND_LINE * -(-len(labelled) // beside))
        figure.legend(
            list(labelled.values()),
            list(labelled),
            loc="outside lower center",
            ncols=beside,
            fontsize=8.5,
            handlelength=3.2,
        )
        return

    inches = height / len(rows) - FRAME
    most = 0
    for axes, labelled in zip(rows[-1], columns, strict=True):
        if len(labelled) > 1:
            beside = _beside(labelled, width / len(columns))
            most = max(most, -(-len(labelled) // beside))
            axes.legend(
                list(labelled.values()),
                list(labelled),
                loc="upper left",
                bbox_to_anchor=(-0.05, -LEGEND_GAP / inches),
                ncols=beside,
                fontsize=8.5,
                handlelength=3.2,
                columnspacing=1,
            )
    figure.set_figheight(height + LEGEND_LINE * most)


def _labelled(column: Sequence[Axes]) -> dict[str, Artist]:
    found: dict[str, Artist] = {}
    for axes in column:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found


def _beside(labelled: dict[str, Artist], inches: float) -> int:
    """How many entries of a legend have room beside each other."""
    longest = max(map(len, labelled)) + HANDLE
    return max(1, min(len(labelled), int(CHARACTERS * inches / longest)))
