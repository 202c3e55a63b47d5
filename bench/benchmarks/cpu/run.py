"""``ironmoe bench cpu``: measure what is not measured yet, row by row."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ironmoe.bench.benchmarks.chosen_shapes import check_memory, select_shapes
from ironmoe.bench.benchmarks.cpu.contest import (
    MATRIX_PRODUCTS,
    PASSES,
    TRANSFORMERS,
    WARMUP,
    Compared,
    Contest,
    compare_results,
    measure,
)
from ironmoe.bench.benchmarks.peers import OURS
from ironmoe.bench.benchmarks.shapes import SHAPES as PUBLISHED
from ironmoe.bench.benchmarks.shapes import SIZES, Shape
from ironmoe.bench.common.machine.hardware import describe_device
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.progress_bars import progress_bars
from ironmoe.bench.common.rows.found import are_ascending_times, is_count
from ironmoe.bench.common.rows.measuring import RowToMeasure, measure_rows
from ironmoe.bench.common.rows.rows_file import Row, rows_file
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.formats import show_rows
from ironmoe.bench.reports.tables import terminal_table

CPU = torch.device("cpu")
SHAPES = (
    Shape("vmoe-s-like", 1576, 384, 1536, 32, 2),
    Shape("vmoe-b-like", 1024, 768, 3072, 8, 2),
)
# Mixtral's experts have no other activation and no biases.
KNOWN = (*SHAPES, *(s for s in PUBLISHED if s.activation == "swiglu" and not s.bias))
DTYPES = (torch.float32, torch.bfloat16)
BYTES_A_NUMBER = 12  # float32 beside float64


def run_bench_cpu(
    console: Console,
    *,
    shapes: Sequence[str] | None = None,
    runs: int = 15,
    seconds: float = 30.0,
    out: Path | None = None,
    again: bool = False,
    form: str | None = None,
) -> list[Row]:
    """Print each row when it is measured, and all of them at the end; return them.

    Args:
        console: for all but rows in a format.
        shapes: texts as ``--shapes`` has them; SHAPES by default.
        runs: how often each is timed at most.
        seconds: of a row, after which no new run begins once there were three.
        out, again: see ``rows_file``.
        form: of the rows on standard output, see ``show_rows``.

    Raises:
        UserError: a package is missing, a shape is none, or the file cannot be used.
        RuntimeError: our results are too far from those in float64.
    """
    if find_spec("transformers") is None:
        raise UserError("bench cpu needs transformers: pip install transformers")
    chosen = select_shapes(shapes, KNOWN, SHAPES)
    for shape in chosen:
        check_memory(shape, BYTES_A_NUMBER)
    contests = [Contest(*place) for place in product(chosen, DTYPES, PASSES)]
    asked = [contest.key for contest in contests]

    settings = {"runs": runs, "seconds": seconds}
    with rows_file(
        "bench cpu", settings, out=out, asked=asked, again=again, is_whole=_is_whole
    ) as kept:
        console.print(kept.greeting, highlight=False, markup=False, soft_wrap=True)
        compared = _compare([c for c in contests if kept.find(c.key) is None], console)
        rows_to_measure = [
            _to_measure(contest, found, runs, seconds) for contest, found in compared.items()
        ]
        measure_rows(rows_to_measure, kept, console, _words)
        rows = [row for key in asked if (row := kept.find(key)) is not None]

    show_rows(rows, form, _table, console)
    console.print(_legend(chosen), highlight=False)
    return rows


def _compare(contests: Sequence[Contest], console: Console) -> dict[Contest, Compared]:
    """What each of the contests computes is compared before anything is timed."""
    found = {}
    if contests:
        console.print(f"Comparing results before times: {len(contests)} rows …", highlight=False)
    with progress_bars(console, transient=True, only_on_terminals=True) as bars:
        task = bars.add_task("comparing results", total=len(contests), note="")
        for contest in contests:
            found[contest] = compare_results(contest)
            bars.advance(task)
    return found


def _to_measure(contest: Contest, compared: Compared, runs: int, seconds: float) -> RowToMeasure:
    rounds = compared.rounds(runs, seconds)

    def work(on_round: Callable[[], object]) -> dict[str, Any]:
        return measure(contest, compared, runs, seconds, on_round)

    return RowToMeasure(
        contest.key, contest.label, rounds, compared.seconds * (WARMUP + rounds), work
    )


def _is_whole(row: Row) -> bool:
    fastest, middle = row.get("fastest"), row.get("milliseconds")
    if not isinstance(fastest, dict) or not isinstance(middle, dict):
        return False
    all_of_them = (OURS, *TRANSFORMERS, MATRIX_PRODUCTS)
    in_order = (are_ascending_times((fastest.get(w), middle.get(w))) for w in all_of_them)
    return is_count(row.get("runs")) and all(in_order)


def _words(row: Row) -> str:
    times = ", ".join(f"{who} {ms:.1f}" for who, ms in row["milliseconds"].items())
    return f"{times} ms, {counted(row['runs'], 'run')}"


def _legend(shapes: Sequence[Shape]) -> str:
    named = [shape.title.replace(" ", " is ") for shape in shapes if shape.name != shape.numbers]
    sizes = f"As {SIZES} {', '.join(named)}. " if named else ""
    return (
        f"{describe_device(CPU)}, torch {torch.__version__}, transformers "
        f"{versions()['transformers']}; median of interleaved runs. {sizes}"
        "'dense' is two matrix products of the same FLOPs with one weight each, into buffers that "
        "are there already: the limit. "
        "Inputs, routing and weights are the same for all; a row appears only if the outputs "
        "agree."
    )


def _table(rows: Sequence[Any]) -> Table:
    """A line for each row, and one above the first row of each layer: its name may be long."""
    numbers = (
        OURS,
        *(f"HF {peer}" for peer in TRANSFORMERS),
        MATRIX_PRODUCTS,
        f"best HF / {OURS}",
        f"{OURS} / {MATRIX_PRODUCTS}",
        "runs",
    )
    table = terminal_table(["layer, dtype and pass", *numbers], title="MoE on CPU, milliseconds")
    table.box, table.padding = SIMPLE_HEAD, (0, 0, 0, 0)
    table.columns[0].no_wrap = True

    layer = None
    for row in rows:
        if row["name"] != layer:
            layer = row["name"]
            table.add_row(f"[bold]{layer}[/]")
        ms = row["milliseconds"]
        peer = min(ms[name] for name in TRANSFORMERS)
        table.add_row(
            f"  {row['dtype']} {row['pass']}",
            *(f"{ms[name]:.1f}" for name in (OURS, *TRANSFORMERS, MATRIX_PRODUCTS)),
            f"{peer / ms[OURS]:.2f}×",
            f"{ms[OURS] / ms[MATRIX_PRODUCTS]:.2f}×",
            str(row["runs"]),
        )

    return table
