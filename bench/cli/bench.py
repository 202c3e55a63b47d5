"""``ironmoe bench …``: each command reads its options and calls the module that measures."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ironmoe.bench.cli.benchmarks.attacks import bench_attacks
from ironmoe.bench.cli.benchmarks.cpu import bench_cpu
from ironmoe.bench.cli.benchmarks.images import bench_images
from ironmoe.bench.cli.benchmarks.kernels import bench_kernels
from ironmoe.bench.cli.benchmarks.offload import bench_offload
from ironmoe.bench.cli.benchmarks.roofline import bench_roofline
from ironmoe.bench.cli.benchmarks.rows import bench_compare, bench_plot
from ironmoe.bench.cli.benchmarks.rows_options import Shapes
from ironmoe.bench.cli.benchmarks.scale import bench_scale
from ironmoe.bench.cli.benchmarks.training import bench_training
from ironmoe.bench.cli.help.command import Commands
from ironmoe.bench.common.errors import clear_errors

bench_app = Commands(
    no_args_is_help=True, help="Measure this machine: our layers beside their peers, in one run."
)


@bench_app.command("gpu")
def bench_gpu(
    shapes: Shapes = None,
    dtype: Annotated[
        str, typer.Option(help="Of the layers: **bfloat16**, **float16** or **float32**.")
    ] = "bfloat16",
    minutes: Annotated[
        float,
        typer.Option(help="Stop after so many minutes, and report what was measured until then."),
    ] = 9.0,
    only: Annotated[
        str | None,
        typer.Option(
            help="Kinds of jobs, separated by commas: {job_kinds}.",
        ),
    ] = None,
    skip_tests: Annotated[
        bool, typer.Option("--skip-tests", help="Do everything but the tests.")
    ] = False,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Also try other block sizes, and propose rows for their table."
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            help="**auto**, **cuda**, or **cpu**, which rehearses the program on tiny layers."
        ),
    ] = "auto",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the newest run in --out that was interrupted."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. By default bench/results.")
    ] = None,
) -> None:
    """Measure the layer beside its peers on this GPU, run the tests that use it, and write JSON and
    Markdown as it goes.

    ``python -m ironmoe.bench.benchmarks.gpu`` does the same and needs only torch and Triton.

    Example:

        ironmoe bench gpu --shapes qwen3-30b --skip-tests --minutes 3
    """
    console = Console()
    with clear_errors(console):
        from ironmoe.bench.benchmarks.gpu.options import make_options
        from ironmoe.bench.benchmarks.gpu.run import run_bench_gpu

        options = make_options(
            device=device,
            dtype=dtype,
            shapes=shapes,
            minutes=minutes,
            only=only,
            skip_tests=skip_tests,
            tune=tune,
            resume=resume,
            out=out,
        )
        try:
            failed = run_bench_gpu(options)
        except KeyboardInterrupt:
            console.print(
                "Interrupted. What was finished is saved; the same command with --resume goes on."
            )
            raise typer.Exit(130) from None
        if failed:
            raise typer.Exit(1)


bench_app.command("cpu")(bench_cpu)
bench_app.command("kernels")(bench_kernels)
bench_app.command("attacks")(bench_attacks)
bench_app.command("training")(bench_training)
bench_app.command("images")(bench_images)
bench_app.command("offload")(bench_offload)
bench_app.command("roofline")(bench_roofline)
bench_app.command("scale")(bench_scale)
bench_app.command("compare")(bench_compare)
bench_app.command("plot")(bench_plot)
