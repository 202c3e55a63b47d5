"""Numbers beside an axis that would stand on each other are left out."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from matplotlib.transforms import Bbox

GAP = 3.0  # between two numbers, in pixels


class Shown(NamedTuple):
    """The text of a tick. place: on the axis; box: where it is printed, in pixels."""

    place: float
    text: str
    box: Bbox


def thin_out(figure: Figure) -> None:
    """Leave out the texts of ticks that would be printed over another one. The marks stay."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        _thin_axis(axes.xaxis, upright=False)
        _thin_axis(axes.yaxis, upright=True)


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """The pairs of neighbouring tick texts that are printed over each other."""
    figure.draw_without_rendering()
    found = []
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if not _is_turned(axis):
            found += [
                (one.text, other.text)
                for one, other in pairwise(_shown(axis))
                if Bbox.intersection(one.box, other.box) is not None
            ]
    return found


def _thin_axis(axis: Axis, *, upright: bool) -> None:
    shown = [] if _is_turned(axis) else _shown(axis)
    spans = [
        (each.box.y0, each.box.y1) if upright else (each.box.x0, each.box.x1) for each in shown
    ]
    left_out = {shown[place].place for place in _too_close(spans)}
    if not left_out:
        return

    # A locator that chooses its places would choose others once the texts have changed.
    places = axis.get_majorticklocs().tolist()
    texts = [label.get_text() for label in axis.get_majorticklabels()]
    axis.set_major_locator(FixedLocator(places))
    axis.set_ticklabels(
        ["" if place in left_out else text for place, text in zip(places, texts, strict=True)]
    )


def _too_close(spans: Sequence[tuple[float, float]]) -> set[int]:
    """Which of these spans to leave out so that no two touch: both ends stay if they can, then
    those between, from the first on."""
    kept: list[int] = []
    for place in dict.fromkeys([len(spans) - 1, *range(len(spans) - 1)] if spans else []):
        low, high = spans[place]
        if all(high + GAP <= spans[other][0] or spans[other][1] + GAP <= low for other in kept):
            kept.append(place)
    return set(range(len(spans))) - set(kept)


def _shown(axis: Axis) -> list[Shown]:
    """The texts inside the view, from left to right or from below."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    found = []
    for tick in axis.get_major_ticks():
        label, place = tick.label1, float(tick.get_loc())
        inside = low - slack <= place <= high + slack
        if inside and label.get_visible() and label.get_text():
            found.append(Shown(place, label.get_text(), label.get_window_extent()))
    return sorted(found, key=lambda each: (each.box.x0 + each.box.x1, each.box.y0 + each.box.y1))


def _is_turned(axis: Axis) -> bool:
    """Whether its texts are rotated: their boxes overlap where the texts do not."""
    return any(label.get_rotation() % 180 for label in axis.get_majorticklabels())
