"""The figures of a row: a value, and how far it scatters where the row says so."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

Row = Mapping[str, Any]

TIME, RATE, SIZE, SHARE = "time", "rate", "size", "share"
# sort → what a larger and a smaller value is called
WORDS = {
    TIME: ("slower", "faster"),
    RATE: ("faster", "slower"),
    SIZE: ("more", "less"),
    SHARE: ("higher", "lower"),
}


class Reading(NamedTuple):
    """A value, and the range in which its runs lie; low and high are None where the row does not
    say it."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def assumed_high(self) -> float | None:
        """The high end. Where the low one alone was measured, the high one is taken to be as far
        away."""
        if self.high is None and self.low is not None:
            return 2 * self.value - self.low
        return self.high


@dataclass(frozen=True)
class Figure:
    """One number that every row of a kind has.

    name: in tables and for --figure; unit: for people; sort: TIME, RATE, SIZE or SHARE (from 0 to
    1); read: the number of a row, None where the row has none.
    """

    name: str
    unit: str
    sort: str
    read: Callable[[Row], Reading | None]

    def of(self, rows: Sequence[Row]) -> Reading | None:
        """The figure of rows of one name. Several are runs: their median, and their range."""
        found = [reading for row in rows if (reading := self.read(row)) is not None]
        if len(found) < 2:
            return found[0] if found else None
        values = [reading.value for reading in found]
        return Reading(median(values), min(values), max(values))


def measured(name: str, unit: str, sort: str) -> Figure:
    """A figure that stands under its name, with the range that its row has."""

    def read(row: Row) -> Reading | None:
        value = number(row.get(name))
        return None if value is None else Reading(value, *_range(row))

    return Figure(name, unit, sort, read)


def _range(row: Row) -> tuple[float | None, float | None]:
    """From "p20" to "p80", from "p25" to "p75", over all "times", or from "fastest" on: then no
    slow side was measured. One run has no range."""
    if row.get("runs") == 1:
        return None, None
    for low, high in (("p20", "p80"), ("p25", "p75")):
        if (first := number(row.get(low))) is not None:
            return first, number(row.get(high))
    if times := [time for entry in _list(row.get("times")) if (time := number(entry)) is not None]:
        return min(times), max(times)
    return number(row.get("fastest")), None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def plain(name: str, unit: str, sort: str, *, factor: float = 1.0) -> Figure:
    """A figure whose rows say nothing of its range."""

    def read(row: Row) -> Reading | None:
        value = number(row.get(name))
        return None if value is None else Reading(factor * value)

    return Figure(name, unit, sort, read)


def counted(name: str) -> Figure:
    """A share of images, with its Wilson interval, as ``Accuracy`` is written."""

    def read(row: Row) -> Reading | None:
        share = row.get(name)
        if not isinstance(share, Mapping) or (value := number(share.get("value"))) is None:
            return None
        interval = _list(share.get("wilson_95"))
        low, high = map(number, interval) if len(interval) == 2 else (None, None)
        return Reading(value, low, high)

    return Figure(name, "%", SHARE, read)


def number(value: Any) -> float | None:
    """The value as a finite number; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
