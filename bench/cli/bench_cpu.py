"""``ironmoe bench cpu``: its options."""

from typing import Annotated

from ironmoe.bench.cli.options import bounded
from ironmoe.bench.cli.rows_options import Again, Format, RowsOut, Shapes, notes_console
from ironmoe.bench.common.errors import clear_errors


def bench_cpu(
    shapes: Shapes = None,
    runs: Annotated[
        int,
        bounded("How often each is timed at most, in turns with the others; the median counts.", 1),
    ] = 15,
    seconds: Annotated[
        float, bounded("Of a row: no new run begins after these, once there were three.", 0)
    ] = 30.0,
    out: RowsOut = None,
    again: Again = False,
    form: Format = None,
) -> None:
    """Time the MoE layer beside Hugging Face's Mixtral experts (eager, grouped_mm) on equal
    weights, and beside dense products.

    What is timed is the forward pass, and the forward pass with the input gradient, in float32 and
    bfloat16. Results are compared before anything is timed. Each row is printed and written when it
    is measured; after Ctrl-C or a kill the same command goes on.

    Example: ironmoe bench cpu --shapes 1576,384,1536,32,2 --shapes decode-32 --runs 5
    """
    console = notes_console(form)
    with clear_errors(console):
        from ironmoe.bench.benchmarks.cpu.run import run_bench_cpu
        from ironmoe.bench.reports.formats import checked_format

        run_bench_cpu(
            console,
            shapes=shapes,
            runs=runs,
            seconds=seconds,
            out=out,
            again=again,
            form=checked_format(form),
        )
