"""Options that several commands share, and the checks on them."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ironmoe.bench.common.choices import named

if TYPE_CHECKING:
    import torch


DEVICES = ("auto", "cpu", "cuda")
LARGEST_SEED = 10**12  # the seeds of epochs, a million times as large, must fit into 64 bits


def bounded(
    text: str, least: float, *names: str, most: float = float("inf"), above: bool = False
) -> Any:
    """An option for a number from ``least`` to ``most``, or above ``least``.

    typer has such an option itself, but its message does not say which number it got.
    """

    def check(value: float | None) -> float | None:
        if value is not None and not (least <= value <= most and (value > least or not above)):
            allowed = f"{'above' if above else 'at least'} {least}"
            allowed = allowed if most == float("inf") else f"from {least} to {most}"
            raise typer.BadParameter(f"must be {allowed}, got {value}")
        return value

    return typer.Option(*names, callback=check, help=text)


def refuse(ctx: typer.Context, options: Iterable[str], why: str) -> None:
    """Raises typer.BadParameter: one of these options was given, and would have no use."""
    for name in options:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            spelled = next(o.opts[0] for o in ctx.command.params if o.name == name)
            raise typer.BadParameter(f"{why}, got {spelled}, too")


Data = Annotated[
    str,
    typer.Option(
        help="**mnist** (5,000 digits), **digits** (8×8), a folder with one sub-folder a class or "
        "with a table of labels (**labels.csv**), an .npz with arrays images and labels, a "
        "**.parquet** file or a folder of them, a folder that datasets saved "
        "(`FOLDER?split=test`), or **package.module:function?key=value** that returns a data set "
        "of torch."
    ),
]
ImageSize = Annotated[
    int | None,
    bounded(
        "Side in pixels, 4 to 1024, that the images of a folder are resized to. By default the "
        "side of the first image if that is square and at most 64 pixels wide, else 32.",
        4,
        most=1024,
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option(help="Leave out images of a folder that cannot be read. The report lists them."),
]
Eps = Annotated[
    str | None,
    typer.Option(
        help="Radii that are attacked, separated by commas, in units of 1/255 of the pixel range, "
        "whatever the norm: 128 is an L2 norm of 0.5; or as fractions of it, 8/255. By default "
        "{usual_radii}."
    ),
]
Norm = Annotated[str, typer.Option(help="{norms}.")]
Steps = Annotated[int, bounded("Gradient steps of PGD, from each random start.", 1)]
Restarts = Annotated[int, bounded("Runs of PGD from different random starts.", 1)]
Alpha = Annotated[
    str | None,
    typer.Option(
        help="Step length in the unit of --eps, for {attacks_with_alpha}. By default 2.5 · eps / "
        "steps, at least eps / 10."
    ),
]
AttackImages = Annotated[int, bounded("How many test images to attack, at most.", 1)]
BatchSize = Annotated[
    int,
    bounded(
        "Images that the model sees at once under attack. Memory and speed depend on it, results "
        "do not.",
        1,
    ),
]
Device = Annotated[str, typer.Option(help="**auto** (a GPU if there is one), **cpu** or **cuda**.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="**float32**, or **bfloat16** for training and the attack's search under autocast; "
        "verdicts are float32 in any case."
    ),
]
AttackSeed = Annotated[
    int, bounded("Of the attacks' random numbers: starting points, proposals of square.", 0)
]
Seed = Annotated[
    int,
    bounded(
        "The first seed. Weights, batches, router noise and random starts depend on it.",
        0,
        most=LARGEST_SEED,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="The folder that gets the files named above. By default one in runs/, named after "
        "data and settings."
    ),
]


def announce(data: "object", console: Console) -> None:
    """Say which data are used, and which files were left out."""
    from ironmoe.bench.data.in_memory import ImageData

    assert isinstance(data, ImageData)
    console.print(
        f"{data.name}: {len(data.images)} images {tuple(data.images.shape[1:])}, "
        f"{len(data.classes)} classes, checksum {data.checksum[:16]}",
        highlight=False,
        markup=False,
    )
    for note in data.notes:
        console.print(note, highlight=False, markup=False)
    for file in data.skipped:
        console.print(
            f"skipped, cannot be read: {file}", highlight=False, markup=False, soft_wrap=True
        )


def announce_radii(
    radii_255: Sequence[float], norm: str, console: Console, alpha_255: float | None = None
) -> None:
    """Say the radii, and the step length if one is given, in both units, and ask back what is most
    likely a mistake."""
    from ironmoe.bench.common.radii import questions, told

    step = "" if alpha_255 is None else f"; alpha {told([alpha_255])}"
    asked = questions(radii_255, norm, alpha_255)
    for line in (f"eps ({norm}): {told(radii_255)}{step}", *asked):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    # It says the same in the words of Python, of a number that nobody wrote here.
    warnings.filterwarnings("ignore", r"alpha=\S+ crosses bounds", UserWarning)


def chosen_device(name: str) -> "torch.device":
    """The device that ``--device`` names; for "auto" a GPU if torch can use one."""
    import torch

    name = named(name, DEVICES)
    if name not in DEVICES:
        raise typer.BadParameter(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "--device cuda needs a GPU that torch can use, and there is none; use --device cpu"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
