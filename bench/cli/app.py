"""The ``ironmoe`` command. torch is imported when a command runs, not before, so that ``--help`` is
quick."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ironmoe.bench.cli.attack import attack
from ironmoe.bench.cli.bench import bench_app
from ironmoe.bench.cli.compare import compare, table
from ironmoe.bench.cli.help.command import Commands
from ironmoe.bench.cli.options import (
    Alpha,
    AttackImages,
    BatchSize,
    Data,
    Device,
    Dtype,
    Eps,
    ImageSize,
    Norm,
    Out,
    Restarts,
    Seed,
    SkipBad,
    Steps,
    announce,
    announce_radii,
    bounded,
    chosen_device,
)
from ironmoe.bench.cli.runs import runs
from ironmoe.bench.cli.study import study
from ironmoe.bench.cli.train import train
from ironmoe.bench.cli.version import print_version
from ironmoe.bench.common.choices import SHORT_DTYPES, chosen_names, named
from ironmoe.bench.common.errors import clear_errors
from ironmoe.bench.common.radii import ascending_radii, from_255, step_length, to_255

if TYPE_CHECKING:
    import torch

    from ironmoe.bench.common.measure import AttackSettings

app = Commands(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=print_version,
            is_eager=True,
            help="Print the versions of ironmoe, torch and Python in one line, and exit.",
        ),
    ] = False,
) -> None:
    """Mixture-of-Experts layers that can be attacked, measured and trusted.

    Start with ironmoe demo. Each command has a --help of its own.
    """


DEFAULT_CHIPS = "sm_80,sm_90,sm_100,gfx942"


@app.command()
def demo(
    data: Data = "mnist",
    seeds: Annotated[
        int, bounded("Repeat everything over this many seeds; the report gives mean and spread.", 1)
    ] = 1,
    seed: Seed = 0,
    epochs: Annotated[
        int | None,
        bounded(
            "Passes over the training images. By default 12; on fewer than 4,000 images more, up "
            "to 100.",
            1,
        ),
    ] = None,
    eps: Eps = None,
    norm: Norm = "Linf",
    steps: Steps = 20,
    restarts: Restarts = 2,
    alpha: Alpha = None,
    attack_images: AttackImages = 500,
    batch_size: BatchSize = 500,
    device: Device = "auto",
    dtype: Dtype = "float32",
    out: Out = None,
    image_size: ImageSize = None,
    skip_bad: SkipBad = False,
) -> None:
    """Train a V-MoE and a dense ViT of the same FLOPs, attack both at several radii, and report
    which one holds and why.

    About two minutes on two CPU cores. Writes report.html, report.json, the pictures and the
    checkpoints.

    After Ctrl-C (or a kill), the same command goes on from the last finished epoch or attack.

    Example:

        ironmoe demo --data digits --seeds 3 --eps 4,8,16
    """
    console = Console()
    with clear_errors(console):
        from ironmoe.bench.common.train import Recipe, default_epochs
        from ironmoe.bench.data.in_memory import load_data
        from ironmoe.bench.demo.run import DemoOptions, run_demo

        target, autocast_dtype = chosen_device(device), _dtype(dtype)
        settings = _attack_settings(
            norm=norm,
            eps=eps,
            steps=steps,
            restarts=restarts,
            alpha=alpha,
            images=attack_images,
            batch_size=batch_size,
        )
        images = load_data(data, image_size, skip_bad)
        announce(images, console)
        length = None if settings.alpha is None else to_255(settings.alpha)
        announce_radii(settings.eps_255, settings.norm, console, length)
        recipe = Recipe(epochs=epochs or default_epochs(len(images.split()[0])))
        options = DemoOptions(
            data=images,
            recipe=recipe,
            attack=settings,
            seeds=list(range(seed, seed + seeds)),
            device=target,
            autocast_dtype=autocast_dtype,
            out=out,
        )
        run_demo(options, console)


app.command()(train)
app.command()(study)
app.command()(attack)
app.command()(compare)
app.command()(table)
app.command()(runs)


@app.command()
def doctor(
    compile_kernels: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Instead of the tests, compile every Triton kernel for the chips, whether they "
            "are here or not, and fail where registers spill or shared memory does not suffice. "
            "This takes some minutes.",
        ),
    ] = False,
    chips: Annotated[
        str, typer.Option(help="With --compile: the chips, separated by commas.")
    ] = DEFAULT_CHIPS,
    only: Annotated[
        str,
        typer.Option(
            help="With --compile: compile only kernels whose names contain this, such as "
            "scatter_rows."
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="With --compile: also write the table as Markdown to this file."),
    ] = None,
    again: Annotated[
        bool,
        typer.Option("--again", help="With --compile: compile anew what is in runs/ already."),
    ] = False,
) -> None:
    """Print versions, devices, and which code each operation runs here and why; then test the
    operations, in about ten seconds.

    With --compile each kernel is printed and kept in runs/ when it is compiled, and after Ctrl-C or
    a kill the same command goes on.

    Exit status 1 if a test fails.

    Examples:

        ironmoe doctor

        ironmoe doctor --compile --chips sm_90 --only scatter_rows
    """
    console = Console()
    with clear_errors(console):
        if compile_kernels:
            from ironmoe.bench.doctor.compile_check import run_compile_check

            passed = run_compile_check(_chips(chips), only, out, console, again=again)
        elif out is not None or only or again or chips != DEFAULT_CHIPS:
            raise typer.BadParameter("--chips, --only, --again and --out belong to --compile")
        else:
            from ironmoe.bench.doctor.doctor import run_doctor

            passed = run_doctor(console)
        if not passed:
            raise typer.Exit(1)


def _attack_settings(
    *,
    norm: str,
    eps: str | None,
    steps: int,
    restarts: int,
    alpha: str | None,
    images: int,
    batch_size: int,
) -> "AttackSettings":
    from ironmoe.attacks.balls.ball import NORMS, norm_named
    from ironmoe.bench.common.measure import AttackSettings

    norm = norm_named(norm)
    radii = ascending_radii(eps, norm)
    if norm not in NORMS:
        raise typer.BadParameter(f"--norm must be one of {', '.join(NORMS)}, got {norm!r}")
    length = step_length(alpha)

    return AttackSettings(
        norm=norm,
        eps_255=radii,
        steps=steps,
        restarts=restarts,
        alpha=None if length is None else from_255(length),
        images=images,
        batch_size=batch_size,
    )


def _chips(names: str) -> tuple[str, ...]:
    from ironmoe.kernels.tuning import CHIPS

    return chosen_names("--chips", names, CHIPS)


def _dtype(name: str) -> "torch.dtype | None":
    import torch

    name = named(SHORT_DTYPES.get(name.lower(), name), ("float32", "bfloat16"))
    if name not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"--dtype must be float32 or bfloat16, got {name!r}")
    return torch.bfloat16 if name == "bfloat16" else None
