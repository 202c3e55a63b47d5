"""``ironmoe bench offload``: measure what is not measured yet, row by row."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ironmoe.bench.benchmarks.offload.modes import MODES, PLAIN, Attacked, Size
from ironmoe.bench.common.machine.hardware import describe_device
from ironmoe.bench.common.rows.found import are_ascending_times, are_times, is_count
from ironmoe.bench.common.rows.measuring import RowToMeasure, measure_rows
from ironmoe.bench.common.rows.rows_file import Row, rows_file
from ironmoe.bench.common.timing import samples_in_turns
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.formats import show_rows
from ironmoe.bench.reports.tables import terminal_table

CPU = torch.device("cpu")
# Bytes a second that 16 lanes carry one way: 32 · 10⁹ transfers of a bit, 128 of 130 bits are data
# (PCI Express Base Specification 5.0).
PCIE_5 = 16 * 32e9 * 128 / 130 / 8
ALLOWED_ERROR = 1e-5  # of the gradients, relative to the largest; float32 sums of other orders


def run_bench_offload(
    console: Console,
    *,
    images: str = "1,8",
    width: int = 384,
    blocks: int = 4,
    experts: int = 32,
    runs: int = 9,
    seconds: float = 60.0,
    out: Path | None = None,
    again: bool = False,
    form: str | None = None,
) -> list[Row]:
    """Print each row when it is measured, and all of them at the end; return them.

    Args:
        console: for all but rows in a format.
        images: numbers of images of a pass, separated by commas; each is a row.
        width, blocks, experts: of the model (``Size``).
        runs: how often each mode is timed at most.
        seconds: of a row, after which no new run begins once there were three.
        out, again: see ``rows_file``.
        form: of the rows on standard output, see ``show_rows``.

    Raises:
        UserError: ``images`` are no numbers above 0, or the file cannot be used.
        RuntimeError: the modes disagree.
    """
    size = Size(width, blocks, experts)
    counts = _counts(images)
    asked = [_key(size, count) for count in counts]

    settings = {"runs": runs, "seconds": seconds}
    with rows_file(
        "bench offload", settings, out=out, asked=asked, again=again, is_whole=_is_whole
    ) as kept:
        console.print(kept.greeting, highlight=False, markup=False, soft_wrap=True)
        missing = [count for count, key in zip(counts, asked, strict=True) if not kept.find(key)]
        rows_to_measure = [_to_measure(size, count, runs, seconds) for count in missing]
        measure_rows(rows_to_measure, kept, console, _words)
        rows = [row for key in asked if (row := kept.find(key)) is not None]

    show_rows(rows, form, _table, console)
    console.print(
        f"{size.name}, which tokens choose at random; {describe_device(CPU)}, torch "
        f"{torch.__version__}; medians of interleaved runs. Host and device are the same memory "
        "here: bytes are counted, and copies take its time. 'PCIe 5' is the time that the copied "
        "bytes take at 63 GB/s, computed.",
        highlight=False,
    )
    return rows


def _counts(images: str) -> list[int]:
    try:
        counts = [int(part) for part in images.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UserError(f"--images must be whole numbers above 0, such as 1,8, got {images!r}")
    return list(dict.fromkeys(counts))


def _key(size: Size, images: int) -> dict[str, Any]:
    return {"model": size.name, "images": images}


def _to_measure(size: Size, images: int, runs: int, seconds: float) -> RowToMeasure:
    def work(on_round: Callable[[], object]) -> dict[str, Any]:
        with ExitStack() as within:
            attacked = {mode: Attacked(within, size, mode, images) for mode in MODES}
            _compare(attacked)
            memory = {mode: model.memory() for mode, model in attacked.items()}
            cpu_ms: dict[str, list[float]] = {mode: [] for mode in MODES}
            passes = {mode: partial(_pass, model, cpu_ms[mode]) for mode, model in attacked.items()}
            samples = samples_in_turns(passes, CPU, runs, seconds, warmup=0, on_round=on_round)

        taken = {mode: [sample.ms for sample in found] for mode, found in samples.items()}
        return {
            "milliseconds": {mode: median(times) for mode, times in taken.items()},
            "fastest": {mode: min(times) for mode, times in taken.items()},
            "cpu_ms": {mode: median(times) for mode, times in cpu_ms.items()},
            "copied_mb": {mode: found.copied / 1e6 for mode, found in memory.items()},
            "pcie5_ms": {mode: 1e3 * found.copied / PCIE_5 for mode, found in memory.items()},
            "saved_mb": {mode: found.saved / 1e6 for mode, found in memory.items()},
            "peak_mb": {mode: found.peak / 1e6 for mode, found in memory.items()},
            "weights_mb": {mode: found.weights / 1e6 for mode, found in memory.items()},
            "runs": len(taken[PLAIN]),
        }

    return RowToMeasure(_key(size, images), counted(images, "image"), runs, seconds, work)


def _pass(attacked: Attacked, cpu_ms: list[float]) -> None:
    """One step, and the time of all threads in it, which other programs do not lengthen."""
    start = time.process_time()
    attacked.gradient()
    cpu_ms.append(1e3 * (time.process_time() - start))


def _compare(attacked: dict[str, Attacked]) -> None:
    expected = attacked[PLAIN].gradient()
    for mode, model in attacked.items():
        error = (model.gradient() - expected).abs().max() / expected.abs().max()
        if not error <= ALLOWED_ERROR:
            raise RuntimeError(
                f"gradients of {mode!r} are off by {error:.3g} of the largest, allowed "
                f"{ALLOWED_ERROR:g}; nothing was timed"
            )


def _is_whole(row: Row) -> bool:
    fastest, middle = row.get("fastest"), row.get("milliseconds")
    if not isinstance(fastest, dict) or not isinstance(middle, dict):
        return False
    in_order = (are_ascending_times((fastest.get(m), middle.get(m))) for m in MODES)
    cpu_ms = row.get("cpu_ms")
    has_cpu = isinstance(cpu_ms, dict) and are_times(cpu_ms.get(mode) for mode in MODES)
    return is_count(row.get("runs")) and has_cpu and all(in_order)


def _words(row: Row) -> str:
    ms = row["milliseconds"]
    times = ", ".join(f"{mode} {ms[mode]:.0f}" for mode in MODES)
    return f"{times} ms, {counted(row['runs'], 'run')}"


def _table(rows: Sequence[Any]) -> Table:
    """A line for each mode, and one above the first of each number of images."""
    numbers = (
        "ms",
        "CPU ms",
        "of plain",
        "copied",
        "PCIe 5, ms",
        "saved",
        "peak",
        "weights",
        "device",
    )
    table = terminal_table(["mode", *numbers], title="A step of an attack; sizes in MB")
    for row in rows:
        table.add_row(f"[bold]{counted(row['images'], 'image')}[/]")
        for mode in MODES:
            ms, peak, weights = (row[k][mode] for k in ("milliseconds", "peak_mb", "weights_mb"))
            cpu_ms = row["cpu_ms"][mode]
            copied, over_pcie, saved = (
                row[name][mode] for name in ("copied_mb", "pcie5_ms", "saved_mb")
            )
            table.add_row(
                f"  {mode}",
                f"{ms:.0f}",
                f"{cpu_ms:.0f}",
                f"{cpu_ms / row['cpu_ms'][PLAIN]:.2f}×",
                f"{copied:.0f}",
                f"{over_pcie:.1f}",
                *(f"{size:.0f}" for size in (saved, peak, weights, peak + weights)),
            )
    return table
