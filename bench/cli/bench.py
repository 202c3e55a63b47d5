"""``ironmoe bench …``: each command reads its options and calls the module that measures."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ironmoe.bench.benchmarks.run_kernel_benchmarks import OPERATIONS
from ironmoe.bench.cli.bench_images import bench_images
from ironmoe.bench.cli.bench_training import bench_training
from ironmoe.bench.cli.help.command import Commands
from ironmoe.bench.cli.options import bounded
from ironmoe.bench.common.errors import clear_errors

if TYPE_CHECKING:
    from ironmoe.bench.benchmarks.shapes import Shape

bench_app = Commands(
    no_args_is_help=True, help="Measure this machine: our layers beside their peers, in one run."
)

ShapeNames = Annotated[
    str | None,
    typer.Option(
        "--shapes",
        help="Names of layers, separated by commas, such as qwen3-30b,olmoe. By default all.",
    ),
]


@bench_app.command("cpu")
def bench_cpu(
    runs: Annotated[
        int, bounded("How often each is timed, in turns with the others; the median counts.", 1)
    ] = 15,
    out: Annotated[
        Path | None, typer.Option(help="Also write the rows as JSON to this file.")
    ] = None,
) -> None:
    """Time the MoE layer beside Hugging Face's Mixtral experts (eager, grouped_mm) on equal
    weights, and beside dense products.

    What is timed is the forward pass, and the forward pass with the input gradient, in float32 and
    bfloat16. Results are compared before anything is timed.

    Example:

        ironmoe bench cpu --runs 5 --out rows.json
    """
    console = Console()
    with clear_errors(console):
        from ironmoe.bench.benchmarks.cpu import run_bench_cpu

        run_bench_cpu(runs, out, console)


@bench_app.command("kernels")
def bench_kernels(
    only: Annotated[
        str | None,
        typer.Option(
            help=f"Operations, separated by commas: {', '.join(OPERATIONS)}.",
        ),
    ] = None,
    seconds: Annotated[
        float, bounded("Seconds for each benchmark, which makes at least three rounds.", 0)
    ] = 0.5,
    out: Annotated[
        Path | None, typer.Option(help="Also write pytest-benchmark's JSON to this file.")
    ] = None,
) -> None:
    """Time each operation by itself with pytest-benchmark: the Triton kernels on a GPU, the torch
    twins elsewhere.

    Example:

        ironmoe bench kernels --only combine,expert_mlp
    """
    with clear_errors(Console()):
        from ironmoe.bench.benchmarks.run_kernel_benchmarks import run_bench_kernels

        if run_bench_kernels(only, seconds, out):
            raise typer.Exit(1)


@bench_app.command("gpu")
def bench_gpu(
    shapes: ShapeNames = None,
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

    Example:

        ironmoe bench roofline --shapes vmoe-b16-e8 --estimate \\
            --blocks "activated stages=3"
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


@bench_app.command("attacks")
def bench_attacks(
    parts: Annotated[
        str,
        typer.Option(
            help="Separated by commas: **pgd**, **autoattack**, **bf16** (the search in bfloat16 "
            "beside float32), "
            "**reference** (AutoAttack in Linf and L2 on three models)."
        ),
    ] = "pgd,autoattack,bf16",
    images: Annotated[int, bounded("Images that PGD attacks.", 1)] = 200,
    autoattack_images: Annotated[int, bounded("Images that AutoAttack attacks.", 1)] = 50,
    runs: Annotated[
        int, bounded("Runs of PGD by each library, in turns; the median is printed.", 1)
    ] = 3,
    batch_size: Annotated[int, bounded("Images in a batch, for every library.", 1)] = 200,
    epochs: Annotated[
        int, bounded("Passes over the training images. Models are kept for the next command.", 1)
    ] = 12,
    data: Annotated[
        str, typer.Option(help="**mnist**, **digits**, a folder of images, or an .npz file.")
    ] = "mnist",
    folder: Annotated[Path, typer.Option(help="Where the trained models are kept.")] = Path(
        "runs/bench-attacks"
    ),
    out: Annotated[
        Path | None, typer.Option(help="Also write the rows as JSON to this file.")
    ] = None,
) -> None:
    """Run PGD and AutoAttack by ironmoe and by torchattacks, foolbox, adv-lib and the official
    AutoAttack, as far as they are installed.

    They attack a V-MoE, which falls, and one that was trained to be robust. Robust accuracies are
    compared before times, and a ratio is printed only if they agree. The official AutoAttack is
    found if its folder is on PYTHONPATH.

    Example:

        ironmoe bench attacks --parts pgd --images 500
    """
    console = Console()
    with clear_errors(console):
        from ironmoe.bench.benchmarks.attacks.contests import (
            PARTS,
            AttackBenchmarkSettings,
            run_bench_attacks,
        )
        from ironmoe.bench.data.in_memory import load_data

        chosen = tuple(part.strip() for part in parts.split(","))
        for part in chosen:
            if part not in PARTS:
                raise typer.BadParameter(f"--parts must be among {', '.join(PARTS)}, got {part!r}")
        settings = AttackBenchmarkSettings(
            images=images,
            autoattack_images=autoattack_images,
            runs=runs,
            batch_size=batch_size,
            epochs=epochs,
        )
        run_bench_attacks(load_data(data, None, False), settings, chosen, folder, out, console)


bench_app.command("training")(bench_training)
bench_app.command("images")(bench_images)
