"""The ``ironmoe`` command. torch is imported by what a command runs, so that ``--help`` is quick."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ironmoe.bench.clear_errors import clear_errors
from ironmoe.bench.cli_bench import bench_app

if TYPE_CHECKING:
    import torch

    from ironmoe.bench.measure import AttackSettings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Mixture-of-Experts layers that can be attacked, measured and trusted.\n\nStart with **ironmoe demo**.",
)
app.add_typer(bench_app, name="bench")

EPS_DEFAULT = "2,4,8,12,16,24"
DEFAULT_CHIPS = "sm_80,sm_90,sm_100,gfx942"
Data = Annotated[
    str,
    typer.Option(
        help="**mnist** (5,000 digits), **digits** (8×8), a folder with one sub-folder a class, or an .npz with arrays images and labels."
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        min=4,
        max=1024,
        help="Side in pixels that the images of a folder are resized to. By default the first image's if it is square and at most 64, else 32.",
    ),
]
SkipBad = Annotated[bool, typer.Option(help="Pass over images of a folder that cannot be read; they are listed in the report.")]
Eps = Annotated[str, typer.Option(help="Radii of the sweep in units of 1/255, separated by commas.")]
Norm = Annotated[str, typer.Option(help="**Linf** or **L2**.")]
Steps = Annotated[int, typer.Option(min=0, help="Gradient steps of PGD.")]
Restarts = Annotated[int, typer.Option(min=1, help="Runs of PGD from different random starts.")]
Alpha = Annotated[
    float | None, typer.Option(help="Step length in units of 1/255. By default 2.5 · eps / steps, at least eps / 10.")
]
AttackImages = Annotated[int, typer.Option(min=1, help="How many test images to attack, at most.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images attacked at once.")]
Device = Annotated[str, typer.Option(help="**auto** (a GPU if there is one), **cpu** or **cuda**.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="**float32**, or **bfloat16** for training and the attack's search under autocast; verdicts are float32 in any case."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="First seed: of weights, batches, router noise and random starts.")]
Out = Annotated[Path | None, typer.Option(help="Folder to write to. By default runs/, named after data and settings.")]


@app.command()
def demo(
    data: Data = "mnist",
    seeds: Annotated[
        int, typer.Option(min=1, help="Repeat everything over this many seeds; the report gives mean and spread.")
    ] = 1,
    seed: Seed = 0,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Passes over the training images. By default 12, more on fewer than 4,000 images, at most 100."
        ),
    ] = None,
    eps: Eps = EPS_DEFAULT,
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
    """Train a V-MoE and a dense ViT of the same FLOPs, attack both over a sweep of eps, and report which holds and why.

    About two minutes on two CPU cores. Writes report.html, report.json, the pictures and the checkpoints.

    Interrupted with Ctrl-C (or killed), the same command goes on from the last finished epoch or attack.

    Example: ironmoe demo --data digits --seeds 3 --eps 4,8,16
    """
    console = Console()
    with clear_errors(console):
        from ironmoe.bench.data import load_data
        from ironmoe.bench.demo import Options, run_demo
        from ironmoe.bench.train import Recipe, default_epochs

        target, autocast_dtype = _device(device), _dtype(dtype)
        attack = _attack_settings(norm, eps, steps, restarts, alpha, attack_images, batch_size)
        images = load_data(data, image_size, skip_bad)
        _announce(images, console)
        recipe = Recipe(epochs=epochs or default_epochs(len(images.split()[0])))
        options = Options(images, recipe, attack, list(range(seed, seed + seeds)), target, autocast_dtype, out)
        run_demo(options, console)


@app.command()
def attack(
    checkpoint: Annotated[Path | None, typer.Argument(help="A .safetensors checkpoint that the demo wrote.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead of a checkpoint: **hf:FOLDER** (a saved image classifier of transformers), **vmoe:PREFIX** (a checkpoint of the "
            "official V-MoE code; or of ViT, ending in .npz; `vmoe:PREFIX?top_k=2&capacity=1.05&images_per_group=8&priority=1&dispatch=bfloat16`), "
            "or **package.module:function** (returns a torch module from images in [0, 1] to logits)."
        ),
    ] = None,
    data: Data = "mnist",
    everything: Annotated[
        bool, typer.Option("--all", help="Attack all images, not only the test split. For data the model was not trained on.")
    ] = False,
    seed: Seed = 0,
    eps: Eps = EPS_DEFAULT,
    norm: Norm = "Linf",
    steps: Steps = 40,
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
    """Attack a model from anywhere, with settings and data of your own, and write the demo's report.

    Examples: ironmoe attack runs/mnist-1a2b3c4d/checkpoints/v-moe-seed0.safetensors --norm L2 --eps 64,128,255 --steps 100

    ironmoe attack --model hf:my-vit --data photos --image-size 224 --all
    """
    console = Console()
    with clear_errors(console):
        from ironmoe.bench.data import load_data
        from ironmoe.bench.reattack import run_attack

        target, attack_dtype = _device(device), _dtype(dtype)
        settings = _attack_settings(norm, eps, steps, restarts, alpha, attack_images, batch_size)
        images = load_data(data, image_size, skip_bad)
        _announce(images, console)
        run_attack(checkpoint, model, images, everything, settings, seed, target, attack_dtype, out, console)


@app.command()
def doctor(
    compile_kernels: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Instead compile every Triton kernel for the chips, present or not, and fail on spills and their like. Some minutes.",
        ),
    ] = False,
    chips: Annotated[str, typer.Option(help="With --compile: for which chips, separated by commas.")] = DEFAULT_CHIPS,
    out: Annotated[Path | None, typer.Option(help="With --compile: also write the table as Markdown to this file.")] = None,
) -> None:
    """Print versions, devices and which code path each operation takes here and why; then test them, in about ten seconds.

    Exit status 1 if a test fails.
    """
    console = Console()
    with clear_errors(console):
        if compile_kernels:
            from ironmoe.bench.compile_check import run_compile_check

            passed = run_compile_check(_chips(chips), out, console)
        elif out is not None or chips != DEFAULT_CHIPS:
            raise typer.BadParameter("--chips and --out belong to --compile")
        else:
            from ironmoe.bench.doctor import run_doctor

            passed = run_doctor(console)
        if not passed:
            raise typer.Exit(1)


def _announce(data: "object", console: Console) -> None:
    from ironmoe.bench.data import ImageData

    assert isinstance(data, ImageData)
    console.print(
        f"{data.name}: {len(data.images)} images {tuple(data.images.shape[1:])}, {len(data.classes)} classes, checksum {data.checksum[:16]}",
        highlight=False,
    )
    for file in data.skipped:
        console.print(f"skipped, cannot be read: {file}", highlight=False, soft_wrap=True)


def _attack_settings(
    norm: str, eps: str, steps: int, restarts: int, alpha: float | None, images: int, batch_size: int
) -> "AttackSettings":
    from ironmoe.attacks.balls import BALLS
    from ironmoe.bench.measure import AttackSettings

    try:
        radii = tuple(sorted({float(part) for part in eps.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"--eps must be numbers separated by commas, such as {EPS_DEFAULT}, got {eps!r}") from None
    if not all(0 <= radius < float("inf") for radius in radii):
        raise typer.BadParameter(f"--eps must be finite and at least 0, got {eps!r}")
    if norm not in BALLS:
        raise typer.BadParameter(f"--norm must be one of {', '.join(BALLS)}, got {norm!r}")
    if alpha is not None and not alpha >= 0:
        raise typer.BadParameter(f"--alpha must be at least 0, got {alpha}")
    return AttackSettings(norm, radii, steps, restarts, None if alpha is None else alpha / 255, images, batch_size=batch_size)


def _chips(names: str) -> tuple[str, ...]:
    from ironmoe.kernels.tuning import CHIPS

    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in CHIPS:
            raise typer.BadParameter(f"--chips must be among {', '.join(CHIPS)}, got {name!r}")
    return chosen


def _device(name: str) -> "torch.device":
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda needs a GPU that torch can use, and there is none; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(name: str) -> "torch.dtype | None":
    import torch

    if name not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"--dtype must be float32 or bfloat16, got {name!r}")
    return torch.bfloat16 if name == "bfloat16" else None
