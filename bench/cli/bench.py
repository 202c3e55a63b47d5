"""``ironmoe bench …``: each command reads its options and calls the module that measures."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ironmoe.bench.cli.bench_attacks import bench_attacks
from ironmoe.bench.cli.bench_cpu import bench_cpu
from ironmoe.bench.cli.bench_images import bench_images
from ironmoe.bench.cli.bench_kernels import bench_kernels
from ironmoe.bench.cli.bench_training import bench_training
from ironmoe.bench.cli.late_help import CommandWithLateHelp
from ironmoe.bench.cli.rows_options import Shapes
from ironmoe.bench.common.errors import clear_errors

if TYPE_CHECKING:
    from ironmoe.bench.benchmarks.shapes import Shape

bench_app = typer.Typer(
    no_args_is_help=True, help="Measure this machine: our layers beside their peers, in one run."
)

ShapeNames = Annotated[
    str | None,
    typer.Option(
        "--shapes",
        help="Names of layers, separated by commas, such as qwen3-30b,olmoe. By default all.",
    ),
]


@bench_app.command("gpu", cls=CommandWithLateHelp)
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

    Example: ironmoe bench gpu --shapes qwen3-30b,mixtral --skip-tests --minutes 3
    """
    with clear_errors(Console()):
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
        if run_bench_gpu(options):
            raise typer.Exit(1)


@bench_app.command("roofline")
def bench_roofline(
    shapes: ShapeNames = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Instead compile the kernels and estimate their time by a static model: programs "
            "an SM, waves, L2, exposed prologues and epilogues. A kernel takes seconds to compile "
            "the first time. Without --shapes, only the first shape.",
        ),
    ] = False,
    chips: Annotated[
        str,
        typer.Option(help="With --estimate: **sm_90** (an H100), **sm_80** (an A100), or both."),
    ] = "sm_90",
    blocks: Annotated[
        list[str] | None,
        typer.Option(
            help="With --estimate: a product, and fields in which its blocks differ from those of "
            "the table. Both are estimated. The option may be repeated."
        ),
    ] = None,
) -> None:
    """Print how fast each layer can be on an H100 at most, from the FLOPs and bytes of our kernels.
    Nothing is measured.

    With --shapes, every kernel of these layers has a line.

    Example: ironmoe bench roofline --shapes vmoe-b16-e8 --estimate --blocks "activated stages=3"
    """
    console = Console()
    with clear_errors(console):
        from ironmoe.bench.benchmarks.gpu.options import select_shapes
        from ironmoe.bench.benchmarks.roofline import print_roofline
        from ironmoe.bench.benchmarks.shapes import SHAPES

        if not estimate and (blocks or chips != "sm_90"):
            raise typer.BadParameter("--chips and --blocks belong to --estimate")
        selected = select_shapes(shapes, SHAPES)
        if estimate:
            _print_estimates(selected if shapes else SHAPES[:1], chips, blocks or [], console)
        else:
            print_roofline(selected, console, every_kernel=shapes is not None)


def _print_estimates(
    shapes: "tuple[Shape, ...]", chips: str, blocks: list[str], console: Console
) -> None:
    from ironmoe.bench.benchmarks.estimate_table import print_estimates
    from ironmoe.bench.benchmarks.static_model import MACHINES

    names = [name.strip() for name in chips.split(",")]
    if unknown := [name for name in names if name not in MACHINES]:
        raise typer.BadParameter(
            f"--chips: {', '.join(map(repr, unknown))} not among {', '.join(MACHINES)}"
        )
    print_estimates(shapes, tuple(MACHINES[name] for name in names), blocks, console)


bench_app.command("cpu")(bench_cpu)
bench_app.command("kernels")(bench_kernels)
bench_app.command("attacks")(bench_attacks)
bench_app.command("training", cls=CommandWithLateHelp)(bench_training)
bench_app.command("images")(bench_images)
