"""``ironmoe bench roofline``: the limits of shapes on GPUs, as rows and as tables."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ironmoe.bench.benchmarks.gpus import Gpu, Rates
from ironmoe.bench.benchmarks.passes import DX, FORWARD, FULL, INFERENCE, PGD
from ironmoe.bench.benchmarks.roofline import (
    bound_of,
    layer_work,
    limit_ms,
    limit_tflops,
    moving_share,
)
from ironmoe.bench.benchmarks.shapes import SIZES, Shape
from ironmoe.bench.reports.tables import print_table

if TYPE_CHECKING:
    from rich.console import Console

PASSES_SHOWN = (INFERENCE, FORWARD, DX, FULL, PGD)
LAYER = "layer"  # in place of a kernel's name: all of them, one after another


def roofline_rows(
    shapes: tuple[Shape, ...], gpus: dict[Gpu, Rates], *, every_kernel: bool
) -> list[dict[str, Any]]:
    """A row for each GPU, shape and pass; with ``every_kernel`` also one for each kernel.

    Keys: "gpu", "shape", "sizes" (see SIZES), "pass", "kernel" (``LAYER`` for all of them), "tflop"
    (10¹² FLOPs), "gigabytes" (10⁹ bytes), "ms", "tflops" (10¹² FLOPs a second), "moving_share" (of
    the layer alone, else None) and "bound" ("FLOPs" or "bytes"; of a layer, what bounds it for most
    of its time).
    """
    rows = []
    for gpu, rates in gpus.items():
        for shape in shapes:
            for pass_name in PASSES_SHOWN:
                rows += _rows_of_pass(gpu, rates, shape, pass_name, every_kernel)
    return rows


def _rows_of_pass(
    gpu: Gpu, rates: Rates, shape: Shape, pass_name: str, every_kernel: bool
) -> list[dict[str, Any]]:
    works = layer_work(shape, pass_name, gpu.chip)
    key: dict[str, Any] = {
        "gpu": gpu.name,
        "shape": shape.name,
        "sizes": shape.sizes,
        "pass": pass_name,
    }
    layer: dict[str, Any] = {
        "kernel": LAYER,
        "tflop": sum(work.flops for work in works) * 1e-12,
        "gigabytes": sum(work.bytes for work in works) * 1e-9,
        "ms": limit_ms(shape, pass_name, rates, gpu.chip),
        "tflops": limit_tflops(shape, pass_name, rates, gpu.chip),
        "moving_share": moving_share(shape, pass_name, rates, gpu.chip),
        "bound": bound_of(works, rates),
    }
    names = [work.kernel for work in works]
    kernels = [
        {
            # a pass with a backward combines rows twice
            "kernel": f"{name}, backward" if name in names[:number] else name,
            "tflop": work.flops * 1e-12,
            "gigabytes": work.bytes * 1e-9,
            "ms": work.ms_at(*rates),
            "tflops": work.flops / work.ms_at(*rates) * 1e-9,
            "moving_share": None,
            "bound": work.bound_at(*rates),
        }
        for number, (name, work) in enumerate(zip(names, works, strict=True))
        if every_kernel
    ]
    return [key | row for row in (layer, *kernels)]


def print_roofline(rows: list[dict[str, Any]], gpus: dict[Gpu, Rates], console: "Console") -> None:
    """Print the rows: every figure for one GPU, the milliseconds side by side for several."""
    one = next(iter(gpus))
    table = _table_of_one(rows, one) if len(gpus) == 1 else _table_of_several(rows, gpus)
    print_table(table, console)
    console.print(rates_in_words(gpus), highlight=False)


def _table_of_one(rows: list[dict[str, Any]], gpu: Gpu) -> Table:
    table = _empty(f"one {gpu.title}", "TFLOP", "GB", "ms", "TFLOP/s", "moving rows", "bound by")

    def figures(row: dict[str, Any]) -> tuple[str, ...]:
        work = _digits(row["tflop"], 3), _digits(row["gigabytes"], 2), _digits(row["ms"], 3)
        if row["kernel"] != LAYER:
            return *work, "", "", row["bound"]
        return *work, f"{row['tflops']:.0f}", f"{row['moving_share']:.1%}", row["bound"]

    _fill(table, rows, figures)
    return table


def _table_of_several(rows: list[dict[str, Any]], gpus: dict[Gpu, Rates]) -> Table:
    table = _empty("several GPUs, milliseconds", *(gpu.name for gpu in gpus))
    first, *_ = (gpu.name for gpu in gpus)
    ms = {(row["gpu"], _place(row)): row["ms"] for row in rows}

    def figures(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(_digits(ms[gpu.name, _place(row)], 3) for gpu in gpus)

    _fill(table, [row for row in rows if row["gpu"] == first], figures)
    return table


def _place(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["shape"], row["pass"], row["kernel"]


def _digits(value: float, decimals: int) -> str:
    """With so many decimals, or one digit where they would all be 0: a layer may be tiny."""
    return f"{value:.{decimals}f}" if value >= 10**-decimals or not value else f"{value:.0e}"


def _empty(where: str, *columns: str) -> Table:
    title = f"Limits of one bf16 layer ({SIZES}) on {where}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 0))
    table.add_column("shape and pass")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _fill(
    table: Table,
    rows: list[dict[str, Any]],
    figures: Callable[[dict[str, Any]], tuple[str, ...]],
) -> None:
    """Add a line for each row, and one above the first row of each shape."""
    shape = None
    for row in rows:
        if row["shape"] != shape:
            shape = row["shape"]
            table.add_row(f"[bold]{Shape(shape, *row['sizes']).title}[/]")
        of_layer = row["kernel"] == LAYER
        table.add_row(f"  {row['pass']}" if of_layer else f"    {row['kernel']}", *figures(row))


def rates_in_words(gpus: dict[Gpu, Rates]) -> str:
    """What the limits rest on, a sentence for each GPU."""
    sentences = []
    for gpu, rates in gpus.items():
        amounts = f"{rates.tflops:g} TFLOP/s and {rates.terabytes:g} TB/s"
        origin = (
            "which others have measured in large products and copies"
            if rates == gpu.reached
            else "as its data sheet says"
        )
        sentences.append(f"{gpu.title}: {amounts}, {origin}.")
    if len(gpus) == 1:
        sentences.append(
            "Moving rows: top-k, dispatch and combine as a share of the layer with its top-k. "
            "A layer is bound by what bounds its kernels for most of its time."
        )
    sentences.append(
        "One kernel runs after another. The launch of a kernel, a few microseconds, is not in its "
        "time: tiny passes take longer than this. Nothing was measured here."
    )
    return "\n".join(sentences)
