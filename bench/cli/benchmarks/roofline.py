"""``ironmoe bench roofline``: reads its options and calls ``benchmarks/roofline_table.py``."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ironmoe.bench.cli.rows_options import Format, Shapes, notes_console
from ironmoe.bench.common.errors import clear_errors

if TYPE_CHECKING:
    from ironmoe.bench.benchmarks.gpus import Gpu
    from ironmoe.bench.benchmarks.shapes import Shape


def bench_roofline(
    shapes: Shapes = None,
    gpu: Annotated[
        str,
        typer.Option(
            help="**h100**, **h200**, **b200**, **a100**, **mi300** (an MI300X) or **rtx4090**; "
            "several separated by commas, or **all**."
        ),
    ] = "h100",
    peak: Annotated[
        bool,
        typer.Option(
            "--peak",
            help="Take an H100 at the rates of its data sheet, as all others are. Without it, an "
            "H100 alone is taken at what it was measured to reach.",
        ),
    ] = False,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Instead compile the kernels and estimate their time by a static model: programs "
            "an SM, waves, L2, exposed prologues and epilogues. A kernel takes seconds to compile "
            "the first time. Without --shapes, only the first shape. For h100 and a100.",
        ),
    ] = False,
    blocks: Annotated[
        list[str] | None,
        typer.Option(
            help="With --estimate: a product, and fields in which its blocks differ from those of "
            "the table. Both are estimated. The option may be repeated."
        ),
    ] = None,
    form: Format = None,
) -> None:
    """Print how fast each layer can be on a GPU at most, from the FLOPs and bytes of our kernels.
    Nothing is measured.

    With --shapes, every kernel of these layers has a line.

    Example: ironmoe bench roofline --gpu h100,b200 --shapes mixtral
    """
    console = notes_console(form)
    with clear_errors(console):
        from ironmoe.bench.benchmarks.chosen_shapes import select_shapes
        from ironmoe.bench.benchmarks.gpus import rates_compared, select_gpus
        from ironmoe.bench.benchmarks.roofline_table import (
            print_roofline,
            rates_in_words,
            roofline_rows,
        )
        from ironmoe.bench.benchmarks.shapes import SHAPES
        from ironmoe.bench.reports.formats import checked_format, written_rows

        form = checked_format(form)
        gpus = select_gpus(gpu)
        selected = select_shapes(shapes, SHAPES)
        if estimate:
            if form:
                raise typer.BadParameter("--format belongs to the limits, and not to --estimate")
            _print_estimates(selected if shapes else SHAPES[:1], gpus, blocks or [], console)
            return
        if blocks:
            raise typer.BadParameter("--blocks belongs to --estimate")

        rates = dict(zip(gpus, rates_compared(gpus, peak=peak), strict=True))
        rows = roofline_rows(selected, rates, every_kernel=shapes is not None)
        if form:
            typer.echo(written_rows(rows, form), nl=False)
            console.print(rates_in_words(rates), highlight=False)
        else:
            print_roofline(rows, rates, console)


def _print_estimates(
    shapes: "tuple[Shape, ...]", gpus: "tuple[Gpu, ...]", blocks: list[str], console: Console
) -> None:
    from ironmoe.bench.benchmarks.estimates.estimate_table import print_estimates
    from ironmoe.bench.benchmarks.estimates.static_model import MACHINES

    machines = {machine.name.lower(): machine for machine in MACHINES.values()}
    for gpu in gpus:
        if gpu.name not in machines:
            raise typer.BadParameter(
                f"--estimate must have a --gpu out of {', '.join(machines)}, got {gpu.name!r}: "
                "there is no static model of others"
            )
    print_estimates(shapes, tuple(machines[gpu.name] for gpu in gpus), blocks, console)
