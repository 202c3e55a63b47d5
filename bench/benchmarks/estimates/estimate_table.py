"""``ironmoe bench roofline --estimate``: the estimates of a layer's kernels as a table, beside
their limits and, if there is one, the measurement."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ironmoe.bench.benchmarks.estimates.block_changes import changed, with_blocks
from ironmoe.bench.benchmarks.estimates.estimate import KernelEstimate, pass_estimate
from ironmoe.bench.benchmarks.estimates.measured import measured
from ironmoe.bench.benchmarks.estimates.static_model import Machine
from ironmoe.bench.benchmarks.passes import DX, FORWARD, FULL, INFERENCE
from ironmoe.bench.benchmarks.roofline import needed_flops
from ironmoe.bench.benchmarks.shapes import SIZES, Shape
from ironmoe.bench.common.machine.compiler import check_compiler
from ironmoe.bench.reports.tables import print_table

if TYPE_CHECKING:
    from rich.console import Console

PASSES_SHOWN = (INFERENCE, FORWARD, DX, FULL)


def print_estimates(
    shapes: tuple[Shape, ...], machines: tuple[Machine, ...], blocks: list[str], console: "Console"
) -> None:
    """Print a table for each shape and machine.

    It has every pass with its kernels; with ``blocks``, the kernels that use the changed rows,
    before and after.

    Raises:
        UserError: Triton is missing, or ``blocks`` cannot be read.
    """
    check_compiler("--estimate")
    for machine in machines:
        for shape in shapes:
            with console.status(f"compiling for {machine.chip.name}"):
                table = _table(shape, machine, blocks)
            print_table(table, console)

    rates = ", ".join(f"{machine.l2_rate:.0f} ({machine.name})" for machine in machines)
    console.print(
        "an SM: programs that one holds, by registers, shared memory and warps. B/clk: bytes a "
        "clock and SM from L2 that would keep the tensor cores busy; to be had are "
        f"{rates}. µs of one program alone: tensor cores, L2, and what nothing of its own hides. "
        "Assumptions: bench/benchmarks/estimates/static_model.py.",
        highlight=False,
    )


def _table(shape: Shape, machine: Machine, blocks: list[str]) -> Table:
    """The table of one shape on one machine."""
    table = _empty(
        f"[bold]{shape.title}[/] ({SIZES}) in bf16 on one {machine.name}: a model, not a "
        "measurement"
    )
    wanted = [changed(shape, text, machine) for text in blocks]
    for text, (product, row) in zip(blocks, wanted, strict=True):
        described = text.removeprefix(product).strip()
        for label, candidate in (("as it is", None), (described, row)):
            table.add_row(product, label, style="bold")
            _add(table, with_blocks(shape, machine, product, candidate))

    for pass_name in () if wanted else PASSES_SHOWN:
        kernels = list(pass_estimate(shape, pass_name, machine))
        table.add_row(*_summary(shape, pass_name, machine, kernels), style="bold")
        _add(table, kernels)

    return table


def _empty(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("kernel")
    table.add_column("tile / warps / stages")
    for column in ("regs", "an SM", "waves", "B/clk", "µs", "limit", "ms"):
        table.add_column(column, justify="right", no_wrap=column == "µs")
    return table


def _add(table: Table, kernels: list[KernelEstimate]) -> None:
    for k in kernels:
        cells = [""] * 6
        if k.finding and k.model:
            tile = f"{k.finding.tile}/{k.finding.warps}/{k.finding.stages}"
            times = f"{k.model.tensor:.1f} {k.model.l2:.1f} {k.model.serial:.1f}"
            cells = [
                tile,
                str(k.finding.registers),
                str(k.model.resident),
                f"{k.model.waves:.1f}",
                f"{k.model.l2_needed:.0f}",
                times,
            ]
        table.add_row(f"  {k.kernel}", *cells, f"{k.limit:.3f}", f"{k.ms:.3f}")


def _summary(
    shape: Shape, pass_name: str, machine: Machine, kernels: list[KernelEstimate]
) -> tuple[str, ...]:
    flops = needed_flops(shape, pass_name) * 1e-9
    ms, limit = sum(k.ms for k in kernels), sum(k.limit for k in kernels)
    rates = f"{flops / ms:.0f} of {flops / limit:.0f} TFLOP/s"
    if found := measured(shape, pass_name, machine):
        rates += f", measured {flops / found.ms:.0f} ({found.device})"
    return pass_name, rates, *[""] * 5, f"{limit:.3f}", f"{ms:.3f}"
