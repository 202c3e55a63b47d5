"""``ironmoe bench kernels``: time what is not timed yet, row by row."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ironmoe.bench.benchmarks.chosen_shapes import check_memory, select_shapes
from ironmoe.bench.benchmarks.kernels.operations import OPERATIONS, Case, Work, cases
from ironmoe.bench.benchmarks.shapes import SHAPES as PUBLISHED
from ironmoe.bench.benchmarks.shapes import Shape
from ironmoe.bench.common.choices import chosen_names
from ironmoe.bench.common.machine.hardware import describe_device
from ironmoe.bench.common.progress_bars import progress_bars
from ironmoe.bench.common.rows.found import are_ascending_times, is_count
from ironmoe.bench.common.rows.measuring import RowToMeasure, measure_rows
from ironmoe.bench.common.rows.rows_file import Row, rows_file
from ironmoe.bench.common.timing import MIN_ROUNDS, samples_in_turns
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.formats import show_rows
from ironmoe.bench.reports.tables import terminal_table

SMALL = (
    Shape("small-gated", 512, 256, 256, 16, 4),
    Shape("small-biases", 788, 192, 768, 8, 2, activation="gelu", bias=True),
)
ON_GPU = tuple(shape for shape in PUBLISHED if shape.name in ("qwen3-30b", "vmoe-b16-e8"))
MOST_ROUNDS = 10_000
BYTES_A_NUMBER = 8  # float32: the numbers and their gradients


def run_bench_kernels(
    console: Console,
    *,
    operations: str | None = None,
    shapes: Sequence[str] | None = None,
    seconds: float = 0.5,
    out: Path | None = None,
    again: bool = False,
    form: str | None = None,
) -> list[Row]:
    """Print each row when it is measured, and all of them at the end; return them.

    Args:
        console: for all but rows in a format.
        operations: names out of OPERATIONS, separated by commas; None is all.
        shapes: texts as ``--shapes`` has them; by default two layers that suit the device.
        seconds: of each row, in which there are three runs at least.
        out, again: see ``rows_file``.
        form: of the rows on standard output, see ``show_rows``.

    Raises:
        UserError: a name is unknown, a shape is none, or the file cannot be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = select_shapes(shapes, (*SMALL, *PUBLISHED), ON_GPU if device.type == "cuda" else SMALL)
    if device.type == "cpu":
        for shape in chosen:
            check_memory(shape, BYTES_A_NUMBER)
    all_cases = list(cases(_known(operations), chosen, device))
    asked = [case.key for case in all_cases]

    settings = {"device": device.type, "seconds": seconds}
    with rows_file(
        "bench kernels", settings, out=out, asked=asked, again=again, is_whole=_is_whole
    ) as kept:
        console.print(kept.greeting, highlight=False, markup=False, soft_wrap=True)
        missing = [case for case in all_cases if kept.find(case.key) is None]
        measure_rows(_quick_pass(missing, seconds, console), kept, console, _words)
        rows = [row for key in asked if (row := kept.find(key)) is not None]

    show_rows(rows, form, _table, console)
    console.print(f"{describe_device(device)}; median of the runs.", highlight=False)
    return rows


def _known(operations: str | None) -> tuple[str, ...]:
    """The operations that are asked for, each once.

    Raises:
        UserError: there is none of such a name.
    """
    if operations is None:
        return tuple(OPERATIONS)
    return chosen_names("--only", operations, OPERATIONS)


def _quick_pass(missing: Sequence[Case], seconds: float, console: Console) -> list[RowToMeasure]:
    """Call everything once, which also compiles it, so that the time of all rows is known."""
    rows = []
    with progress_bars(console, transient=True, only_on_terminals=True) as bars:
        task = bars.add_task("first calls", total=len(missing), note="")
        for case in missing:
            once = _seconds_of_a_call(case.work(), case.device, seconds)
            rounds = round(min(MOST_ROUNDS, max(MIN_ROUNDS, seconds / once)))
            rows.append(
                RowToMeasure(case.key, case.label, rounds, once * rounds, _measuring(case, seconds))
            )
            bars.advance(task)
    return rows


def _seconds_of_a_call(work: Work, device: torch.device, seconds: float) -> float:
    """About. A first call that is slow may have compiled kernels."""
    once = 0.0
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        once = max(time.perf_counter() - start, 1e-6)
        if once * MIN_ROUNDS <= seconds:
            break
    return once


def _measuring(case: Case, seconds: float) -> Callable[[Callable[[], object]], dict[str, Any]]:
    def measure(on_round: Callable[[], object]) -> dict[str, Any]:
        samples = samples_in_turns(
            {"": case.work()}, case.device, MOST_ROUNDS, seconds, on_round=on_round
        )[""]
        times = sorted(sample.ms for sample in samples)
        low, middle, high = quantiles(times, n=4, method="inclusive")
        return {
            "name": case.name,
            "ms": middle,
            "p25": low,
            "p75": high,
            "fastest": times[0],
            "slowest": times[-1],
            "runs": len(times),
        }

    return measure


def _is_whole(row: Row) -> bool:
    times = ("fastest", "p25", "ms", "p75", "slowest")
    return are_ascending_times(map(row.get, times)) and is_count(row.get("runs"))


def _words(row: Row) -> str:
    return f"{_digits(row['ms'])} ms, {counted(row['runs'], 'run')}"


def _digits(ms: float) -> str:
    return f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def _table(rows: Sequence[Any]) -> Table:
    names = ("operation", "layer", "dtype")
    title = "Operations, milliseconds"
    table = terminal_table(
        [*names, "median", "middle half", "fastest", "runs"], title=title, names=len(names)
    )
    table.box, table.padding = SIMPLE_HEAD, (0, 0, 0, 0)
    for column in table.columns[1:]:
        column.no_wrap = True
    for row in rows:
        table.add_row(
            f"{row['operation']} {row['variant']}".strip(),
            row["name"],
            row["dtype"],
            _digits(row["ms"]),
            f"{_digits(row['p25'])}–{_digits(row['p75'])}",
            _digits(row["fastest"]),
            str(row["runs"]),
        )
    return table
