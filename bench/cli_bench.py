"""``ironmoe bench …``: each command reads its options and calls the module that measures."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ironmoe.bench.clear_errors import clear_errors

bench_app = typer.Typer(no_args_is_help=True, help="Measure this machine: our layers beside their peers, in one run.")

ShapeNames = Annotated[
    str | None, typer.Option("--shapes", help="Names of layers, separated by commas, such as qwen3-30b,olmoe.")
]


@bench_app.command("cpu")
def bench_cpu(
    runs: Annotated[int, typer.Option(min=1, help="Counted runs of each, interleaved; the median is printed.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Also write the rows as JSON to this file.")] = None,
) -> None:
    """The MoE layer against Hugging Face's Mixtral experts (eager, grouped_mm) on equal weights, and against dense products.

    Forward, and forward + input gradient, in float32 and bfloat16. Equality is checked before anything is timed.
    """
    console = Console()
    with clear_errors(console):
        from ironmoe.bench.cpu import run_bench_cpu

        run_bench_cpu(runs, out, console)


@bench_app.command("kernels")
def bench_kernels(
    only: Annotated[
        str | None,
        typer.Option(
            help="Operations, separated by commas: topk_route, plan_dispatch, grouped_matmul, combine, expert_mlp, attack_step."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="For each benchmark; three rounds at least.")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="Also write pytest-benchmark's JSON to this file.")] = None,
) -> None:
    """Time each operation by itself with pytest-benchmark: the Triton kernels on a GPU, the torch twins elsewhere.

    Example: ironmoe bench kernels --only combine,expert_mlp
    """
    with clear_errors(Console()):
        from ironmoe.bench.kernels_command import BenchKernelsError, run_bench_kernels

        try:
            status = run_bench_kernels(only, seconds, out)
        except BenchKernelsError as error:
            raise typer.BadParameter(str(error)) from None
        if status:
            raise typer.Exit(1)


@bench_app.command("gpu")
def bench_gpu(
    shapes: ShapeNames = None,
    dtype: Annotated[str, typer.Option(help="**bfloat16**, **float16** or **float32**.")] = "bfloat16",
    minutes: Annotated[float, typer.Option(help="Stop within these, with what there is.")] = 9.0,
    skip_tests: Annotated[bool, typer.Option("--skip-tests", help="Measure only.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Also propose rows for the table of block sizes.")] = False,
    device: Annotated[
        str, typer.Option(help="**auto**, **cuda**, or **cpu**, which rehearses the program on tiny shapes.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of the results. By default bench/results.")] = None,
) -> None:
    """Run the test suite on this GPU, then measure the layer beside its peers, and write JSON and Markdown.

    What ``python -m ironmoe.bench.gpu`` does, which needs nothing but torch and Triton.

    Example: ironmoe bench gpu --shapes qwen3-30b,mixtral --skip-tests --minutes 3
    """
    with clear_errors(Console()):
        from ironmoe.bench.gpu import OptionError, make_options, run_bench_gpu

        try:
            options = make_options(device, dtype, shapes, minutes, skip_tests, tune, out)
        except OptionError as error:
            raise typer.BadParameter(str(error)) from None
        if run_bench_gpu(options):
            raise typer.Exit(1)


@bench_app.command("roofline")
def bench_roofline(shapes: ShapeNames = None) -> None:
    """How fast each shape can be on an H100 at most, from the FLOPs and bytes of our kernels. Measures nothing.

    With --shapes, every kernel of those.
    """
    console = Console()
    with clear_errors(console):
        from ironmoe.bench.gpu import OptionError, select_shapes
        from ironmoe.bench.roofline import print_roofline
        from ironmoe.bench.shapes import SHAPES

        try:
            selected = select_shapes(shapes, SHAPES)
        except OptionError as error:
            raise typer.BadParameter(str(error)) from None
        print_roofline(selected, console, every_kernel=shapes is not None)
