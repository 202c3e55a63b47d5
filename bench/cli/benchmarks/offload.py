"""``ironmoe bench offload``: its options."""

from typing import Annotated

import typer

from ironmoe.bench.cli.benchmarks.rows_options import Again, Format, RowsOut, notes_console
from ironmoe.bench.cli.options import bounded
from ironmoe.bench.common.errors import clear_errors


def bench_offload(
    images: Annotated[
        str, typer.Option(help="Images of a pass, separated by commas; each number is a row.")
    ] = "1,8",
    width: Annotated[int, bounded("D of the model, a multiple of 64.", 64)] = 384,
    blocks: Annotated[int, bounded("Blocks, of which every second one has experts.", 2)] = 4,
    experts: Annotated[int, bounded("Experts of a layer.", 2)] = 32,
    runs: Annotated[
        int,
        bounded("How often each is timed at most, in turns with the others; the median counts.", 1),
    ] = 9,
    seconds: Annotated[
        float, bounded("Of a row: no new run begins after these, once there were three.", 0)
    ] = 60.0,
    out: RowsOut = None,
    again: Again = False,
    form: Format = None,
) -> None:
    """Measure what less memory under attack costs: experts in host memory, recomputed
    pre-activations, activation checkpointing.

    The pass is a V-MoE with frozen weights and the gradient of its images, on CPU, where host and
    device are one memory: bytes are counted, and the time over PCIe is computed.

    Example:

        ironmoe bench offload --images 1,8 --experts 32
    """
    console = notes_console(form)
    with clear_errors(console):
        from ironmoe.bench.benchmarks.offload.run import run_bench_offload
        from ironmoe.bench.reports.formats import checked_format

        run_bench_offload(
            console,
            images=images,
            width=width,
            blocks=blocks,
            experts=experts,
            runs=runs,
            seconds=seconds,
            out=out,
            again=again,
            form=checked_format(form),
        )
