"""Measure rows one after another: each is kept and printed at once, with the time that is left."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from ironmoe.bench.common.durations import in_words
from ironmoe.bench.common.progress_bars import progress_bars
from ironmoe.bench.common.rows.remaining import Remaining
from ironmoe.bench.common.rows.rows_file import Key, Row, RowsFile


class RowToMeasure(NamedTuple):
    """One row that is still to be measured.

    key: its entries that tell it from others; label: what people call it; rounds, seconds: that it
    is expected to take; measure: makes the other entries, and calls its argument after each round.
    """

    key: Key
    label: str
    rounds: int
    seconds: float
    measure: Callable[[Callable[[], object]], Mapping[str, Any]]


def measure_rows(
    rows: Sequence[RowToMeasure],
    kept: RowsFile,
    console: Console,
    words: Callable[[Row], str],
) -> None:
    """Measure the rows. Say at the start and after each row how long the others will take.

    Args:
        words: the figures of a row in a few words.
    """
    if not rows:
        return
    pace = Remaining({row.label: row.seconds for row in rows})
    console.print(
        f"{len(rows)} to measure, in about {in_words(pace.seconds_left)}.", highlight=False
    )
    for row in rows:
        start = time.monotonic()
        with progress_bars(console, transient=True, only_on_terminals=True) as bars:
            task = bars.add_task(row.label, total=row.rounds, note="")

            def advance(task: Any = task, bars: Any = bars) -> None:
                bars.advance(task)

            measured = kept.put(row.key, row.measure(advance))
        pace.note(row.label, time.monotonic() - start)

        left = f"; {len(pace.left)} left, about {in_words(pace.seconds_left)}" if pace.left else ""
        console.print(f"{row.label}: {words(measured)}{left}", highlight=False, soft_wrap=True)
