"""``ironmoe bench scale``: reads its options and calls ``benchmarks/scale``."""

from pathlib import Path
from typing import Annotated

import typer

from ironmoe.bench.cli.benchmarks.rows_options import Again, Format, Shapes, notes_console
from ironmoe.bench.cli.options import bounded, refuse
from ironmoe.bench.common.errors import clear_errors

COMPUTED = (
    "parts",
    "shapes",
    "tokens",
    "shared",
    "layers",
    "ranks",
    "gpus",
    "imbalance",
    "gpu",
    "node",
    "nvlink_gbs",
    "network_gbs",
    "memory_gb",
)
OF_ROWS = ("out", "again")


def bench_scale(
    ctx: typer.Context,
    parts: Annotated[
        str,
        typer.Option(
            "--part",
            help="Separated by commas: **cost** (bytes and milliseconds of a layer), **pays** "
            "(beside FSDP2 and replicas), **mesh** (groups of --gpus), **memory** (of a rank).",
        ),
    ] = "cost,pays,mesh,memory",
    shapes: Shapes = None,
    tokens: Annotated[
        int | None, bounded("Tokens of a rank. By default those of the layer.", 1)
    ] = None,
    shared: Annotated[
        int | None,
        bounded("Hidden width of the experts that every token takes; 0: there are none.", 0),
    ] = None,
    layers: Annotated[
        int | None, bounded("How many such layers the model has: all must fit.", 1)
    ] = None,
    ranks: Annotated[
        str,
        typer.Option(help="Sizes of the expert-parallel group, separated by commas."),
    ] = "1,2,4,8,16,32,64",
    gpus: Annotated[int, bounded("GPUs that **mesh** lays out in groups.", 1)] = 64,
    imbalance: Annotated[
        float,
        bounded("Rows of the rank that receives most, divided by the mean of all ranks.", 1),
    ] = 1.0,
    gpu: Annotated[
        str, typer.Option(help="**h100**, **h200**, **b200**, **a100** or **mi300**.")
    ] = "h100",
    node: Annotated[int, bounded("GPUs of a node.", 1, "--ranks-a-node")] = 8,
    nvlink_gbs: Annotated[
        float | None,
        bounded("GB/s that a GPU sends to others of its node.", 0, above=True),
    ] = None,
    network_gbs: Annotated[
        float | None, bounded("GB/s that a GPU sends to other nodes.", 0, above=True)
    ] = None,
    memory_gb: Annotated[float | None, bounded("GB of a GPU.", 0, above=True)] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Instead run small layers in 2 and in 4 processes of this machine, count the "
            "bytes that they send, and compare: they must be equal.",
        ),
    ] = False,
    throughput: Annotated[
        bool,
        typer.Option(
            "--throughput",
            help="Instead measure one layer on the CPU of this machine, in one process and shared "
            "out over two.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of the rows of --throughput, as JSON, written after each. By default "
            "runs/…/rows.json."
        ),
    ] = None,
    again: Again = False,
    form: Format = None,
) -> None:
    r"""Compute what expert parallelism costs, when it pays, and what memory a rank needs.

    All figures come from bytes, FLOPs and data sheets; nothing is measured, but for --check and
    --throughput. Without --shapes the layers are those of V-MoE-L/16, V-MoE-H/14 and DeepSeek-V3,
    and memory is that of the papers' whole models.

    Examples:

        ironmoe bench scale --part cost --shapes vmoe-l16-e32

        ironmoe bench scale --part pays --gpu a100 --tokens 4096 \
            --ranks 8,16 --network-gbs 12.5

        ironmoe bench scale --check

        ironmoe bench scale --throughput --format json
    """
    console = notes_console(form)
    with clear_errors(console):
        from ironmoe.bench.benchmarks.scale.links import changed, gpu_with_links
        from ironmoe.bench.benchmarks.scale.run import ScaleSettings, run_bench_scale
        from ironmoe.bench.reports.formats import checked_format

        form = checked_format(form)
        if check or throughput:
            others = (*COMPUTED, "throughput") if check else COMPUTED
            refuse(ctx, others, f"--{'check' if check else 'throughput'} has layers of its own")
        if not throughput:
            refuse(ctx, OF_ROWS, "only the rows of --throughput are kept")
        if check:
            from ironmoe.bench.benchmarks.scale.check import run_check

            run_check(console, form)
            return
        if throughput:
            from ironmoe.bench.benchmarks.scale.throughput import run_throughput

            run_throughput(console, out=out, again=again, form=form)
            return
        found, links = gpu_with_links(gpu)
        settings = ScaleSettings(
            parts=parts,
            shapes=shapes,
            tokens=tokens,
            shared=shared,
            layers=layers,
            ranks=ranks,
            gpus=gpus,
            imbalance=imbalance,
            node=node,
            gpu=found,
            links=changed(
                links, nvlink_gbs=nvlink_gbs, network_gbs=network_gbs, memory_gb=memory_gb
            ),
        )
        run_bench_scale(settings, console, form)
