"""``ironmoe bench kernels``: its options."""

from typing import Annotated

import typer

from ironmoe.bench.cli.options import bounded
from ironmoe.bench.cli.rows_options import Again, Format, RowsOut, Shapes, notes_console
from ironmoe.bench.common.errors import clear_errors

OPERATIONS = "topk_route, plan_dispatch, grouped_matmul, combine, expert_mlp, attack_step"


def bench_kernels(
    only: Annotated[
        str | None, typer.Option(help=f"Operations, separated by commas: {OPERATIONS}.")
    ] = None,
    shapes: Shapes = None,
    seconds: Annotated[
        float, bounded("Seconds of each row, in which there are three runs at least.", 0)
    ] = 0.5,
    out: RowsOut = None,
    again: Again = False,
    form: Format = None,
) -> None:
    """Time each operation by itself: the Triton kernels on a GPU, the torch twins elsewhere.

    Each row is printed and written when it is measured; after Ctrl-C or a kill the same command
    goes on.

    Example: ironmoe bench kernels --only combine,expert_mlp --shapes 788,192,768,8,2
    """
    console = notes_console(form)
    with clear_errors(console):
        from ironmoe.bench.benchmarks.kernels.run import run_bench_kernels
        from ironmoe.bench.reports.formats import checked_format

        run_bench_kernels(
            console,
            operations=only,
            shapes=shapes,
            seconds=seconds,
            out=out,
            again=again,
            form=checked_format(form),
        )
