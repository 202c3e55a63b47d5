"""Logarithmic axes with numbers that people read."""

from math import floor, log10

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

DIGITS: tuple[tuple[float, ...], ...] = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 5, 7),
    (1, 2, 3, 4, 5, 6, 7, 8, 9),
)
"""Of ticks, from far apart to close together."""

FEWEST, MOST = 3, 7
NARROW = 2.5  # ends of an axis, as a ratio, between which equal steps are as good
CLOSEST = 1.25  # ends of an axis, as a ratio; rounding is no difference between numbers
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def log_axis(axes: Axes, which: str) -> None:
    """Make an axis logarithmic, after all was drawn that decides its ends. which: "x" or "y"."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = sorted(map(float, axis.get_view_interval()))
    if high < CLOSEST * low:
        low, high = low / CLOSEST, high * CLOSEST
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    ticks = log_ticks(low, high)
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(ticks, [_text(tick) for tick in ticks])


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two ends, at least three if there is room, at most seven.

    low, high: more than 0.
    """
    if high < NARROW * low:
        steps = MaxNLocator(4).tick_values(low, high)
        return [float(tick) for tick in steps if low <= tick <= high]

    decades = range(floor(log10(low)), floor(log10(high)) + 1)
    ticks: list[float] = []
    for digits in DIGITS:
        ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= FEWEST:
            break
    return ticks[:: -(-len(ticks) // MOST)] if ticks else []


def _text(tick: float) -> str:
    if tick >= 1e-3:
        return f"{tick:g}"
    digit, _, power = f"{tick:.0e}".partition("e")
    raised = f"10{str(int(power)).translate(SUPERSCRIPTS)}"
    return raised if digit == "1" else f"{digit}·{raised}"
