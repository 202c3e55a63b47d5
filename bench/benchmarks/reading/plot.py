"""``ironmoe bench plot``: rows as bars or points, a column of pictures for each file."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from ironmoe.bench.benchmarks.reading.comparison import check_kinds, selected
from ironmoe.bench.benchmarks.reading.figures import SHARE, Figure, Reading
from ironmoe.bench.benchmarks.reading.files import Key, ReadRows, RowsError, read_rows
from ironmoe.bench.benchmarks.reading.kinds import Kind, telling
from ironmoe.bench.benchmarks.reading.origins import in_one_line
from ironmoe.bench.reports.style import COLORS, STYLE

ENDINGS = (".png", ".svg", ".pdf")
MOST_BARS = 400  # of one file: more can neither be read nor be shown by a browser
LOG_FROM = 30  # times the smallest value that the largest one has: smaller bars would be a line
BAR, GAP = 0.17, 0.14  # inches, of a bar and between groups
MARGIN = 1.7  # inches above and below the bars
LABEL_WIDTH, TITLE_WIDTH = 44, 52  # characters of a line
MORE_COLORS = ("#b8860b", "#5f6b73", "#c2417f", "#2a9d8f", "#7a5230", "#9aa500", "#0a3d62")


class Panel(NamedTuple):
    """One figure of one kind of rows. labels: of groups of bars; series: of bars side by side;
    same: what all rows share, in words; readings: of each file, by label and series."""

    kind: Kind
    figure: Figure
    labels: list[str]
    series: list[str]
    same: str
    readings: list[dict[tuple[str, str], Reading]]

    def slots(self) -> list[list[str]]:
        """For each label, the series of which any file has a bar."""
        there = {place for found in self.readings for place in found}
        return [[name for name in self.series if (label, name) in there] for label in self.labels]

    @property
    def is_wide(self) -> bool:
        """Whether the smallest bars could not be seen beside the largest: then the scale is
        logarithmic. The length of a bar would say nothing there, so points are drawn."""
        values = [reading.value for found in self.readings for reading in found.values()]
        of_times = self.figure.sort != SHARE and min(values) > 0
        return of_times and max(values) > LOG_FROM * min(values)

    @property
    def gap(self) -> float:
        """Inches between groups. Bars that stand alone are no groups."""
        return GAP if any(len(names) > 1 for names in self.slots()) else GAP / 2

    @property
    def inches(self) -> float:
        bars = sum(map(len, self.slots()))
        lines = sum(label.count("\n") + 1 for label in self.labels)
        return max(BAR * bars, 0.16 * lines) + self.gap * len(self.labels) + MARGIN


def checked_picture(out: Path) -> Path:
    """Raises: RowsError: no picture can be written there."""
    if out.suffix.lower() not in ENDINGS:
        raise RowsError(f"--out must end in {', '.join(ENDINGS)}, got {out}")
    if not out.resolve().parent.is_dir():
        raise RowsError(f"--out must be a file in a folder that exists, got {out}")
    if out.is_dir():
        raise RowsError(f"--out must be a file, got the folder {out}")
    return out


def without_a_common_row(paths: Sequence[Path], only: Iterable[str] = ()) -> str:
    """A sentence where no row is in two of the files, so that nothing stands side by side; "" where
    one is, or where there is one file.

    Raises:
        RowsError: a file has no rows.
    """
    keys = [
        {(kind, key) for kind, of_kind in file.rows.items() for key in of_kind}
        for file in (selected(read_rows(path), only) for path in paths)
    ]
    if len(keys) < 2 or len(set.union(*keys)) < sum(map(len, keys)):
        return ""
    return (
        "No row is in two of these files, so nothing stands side by side: they are of other work. "
        "ironmoe bench compare says what differs."
    )


def draw_files(
    paths: Sequence[Path], figure: str | None = None, only: Iterable[str] = ()
) -> Picture:
    """Draw the rows of all files, side by side on the same axes.

    Args:
        figure: its name; the first one of each kind by default.
        only: texts that the name of a row must have.

    Raises:
        RowsError: a file has no rows, files have no kind in common, no kind has the figure, or
            there are too many bars.
    """
    files = [selected(read_rows(path), only) for path in paths]
    check_kinds(*files)
    kinds = [kind for kind in files[0].kinds if all(kind in file.kinds for file in files)]
    panels = [
        panel_of(kind, shown, files)
        for kind in kinds
        if (shown := kind.figure(figure) if figure else kind.figures[0])
    ]
    if not panels:
        names = dict.fromkeys(f.name for kind in kinds for f in kind.figures)
        raise RowsError(f"--figure must be {' or '.join(names)}, got {figure!r}")
    return _drawn(panels, files)


def panel_of(kind: Kind, figure: Figure, files: Sequence[ReadRows]) -> Panel:
    """The bars of all files.

    Raises:
        RowsError: there are none, or more than can be read.
    """
    found: list[dict[Key, Reading]] = []
    for file in files:
        read = {key: figure.of(runs) for key, runs in file.rows[kind.name].items()}
        found.append({key: reading for key, reading in read.items() if reading is not None})
    keys = list(dict.fromkeys(key for readings in found for key in readings))
    if not 0 < len(keys) <= MOST_BARS:
        raise RowsError(
            f"a picture has from 1 to {MOST_BARS} bars of {figure.name}, these files have "
            f"{len(keys)}; choose some of them with --only"
        )

    at = kind.keys.index(kind.series)
    shown = [i for i in telling(keys) if i != at]
    labels = {key: _label(kind, key, shown) for key in keys}
    series = list(dict.fromkeys(key[at] for key in keys))
    fixed = [i for i in range(len(kind.keys)) if i not in shown and (i != at or len(series) == 1)]
    return Panel(
        kind,
        figure,
        labels=list(dict.fromkeys(labels.values())),
        series=series,
        same=kind.words(keys[0], fixed),
        readings=[
            {(labels[key], key[at]): reading for key, reading in readings.items()}
            for readings in found
        ],
    )


def _label(kind: Kind, key: Key, shown: list[int]) -> str:
    text = kind.words(key, shown)
    return "\n".join(textwrap.wrap(text, LABEL_WIDTH, break_on_hyphens=False))


def _drawn(panels: Sequence[Panel], files: Sequence[ReadRows]) -> Picture:
    size = 3.2 + 4.2 * len(files), sum(panel.inches for panel in panels)
    with plt.rc_context(STYLE):
        picture = plt.figure(figsize=size)
        heights = [panel.inches for panel in panels]
        parts = picture.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)
        for part, panel in zip(parts[:, 0], panels, strict=True):
            axes = part.subplots(1, len(files), sharex=True, sharey=True, squeeze=False)[0]
            for place, file, readings in zip(axes, files, panel.readings, strict=True):
                _draw_bars(place, panel, readings)
                place.set_title(_title(file), fontsize=9)
            _scale(axes[0], panel)
            title = f"{panel.kind.name}: {panel.figure.name}"
            part.suptitle(f"{title} ({panel.same})" if panel.same else title, fontsize=11)
            if len(panel.series) > 1:
                handles, names = axes[0].get_legend_handles_labels()
                columns = min(len(names), 2 + 2 * len(files))
                part.legend(
                    handles,
                    names,
                    title=panel.kind.series,
                    loc="outside lower center",
                    ncols=columns,
                    fontsize=9,
                    title_fontsize=9,
                )
    return picture


def _draw_bars(axes: Axes, panel: Panel, readings: dict[tuple[str, str], Reading]) -> None:
    """One file: a group of bars for each label, with the range of each where it is known."""
    factor = 100.0 if panel.figure.sort == SHARE else 1.0
    places: dict[str, list[tuple[float, Reading]]] = {name: [] for name in panel.series}
    ticks, y = [], 0.0
    for label, names in zip(panel.labels, panel.slots(), strict=True):
        ticks.append(y + (len(names) - 1) / 2)
        for name in names:
            if (reading := readings.get((label, name))) is not None:
                places[name].append((y, reading))
            y += 1
        y += panel.gap / BAR

    for name, color in zip(panel.series, _colors(len(panel.series)), strict=True):
        at = [height for height, _ in places[name]]
        values = [factor * reading.value for _, reading in places[name]]
        if panel.is_wide:
            axes.plot(values, at, "o", markersize=5, color=color, label=name)
        else:
            axes.barh(at, values, height=0.86, color=color, label=name)
        for height, reading in places[name]:
            _write_value(axes, height, reading, factor)
    axes.set_yticks(ticks, panel.labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - panel.gap / BAR, -1)
    axes.grid(visible=False, axis="y")
    scale = "logarithmic scale" if panel.is_wide else ""
    axes.set_xlabel(", ".join(filter(None, (panel.figure.unit, scale))))


def _write_value(axes: Axes, y: float, reading: Reading, factor: float) -> None:
    """The number, and a line from the low to the high end, as far as they were measured."""
    value, *ends = (None if x is None else factor * x for x in reading)
    assert value is not None
    low, high = (value if end is None else end for end in ends)
    if low != high:
        axes.plot([low, high], [y, y], color="#222222", linewidth=0.8)
    end = max(value, high)
    text = f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
    axes.annotate(
        text, (end, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
    )


def _scale(axes: Axes, panel: Panel) -> None:
    """From 0, or logarithmic where the smallest bars could not be seen; room for the numbers."""
    found = [reading for readings in panel.readings for reading in readings.values()]
    smallest = min(reading.value for reading in found)
    largest = max(reading.value if reading.high is None else reading.high for reading in found)
    if panel.figure.sort == SHARE:
        axes.set_xlim(0, 112)
    elif panel.is_wide:
        axes.set_xscale("log")
        axes.set_xlim(smallest / 2, 2 * largest)
    else:
        axes.set_xlim(0, 1.16 * largest or 1)


def _colors(number: int) -> list[str]:
    known = [*COLORS, *MORE_COLORS]
    return [known[i % len(known)] for i in range(number)]


def _title(file: ReadRows) -> str:
    return "\n".join(
        line
        for text in (file.path.name, in_one_line(file.facts))
        for line in textwrap.wrap(text, TITLE_WIDTH)
    )
