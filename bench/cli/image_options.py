"""Options about files of images: their labels, and how pictures become pixels."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ironmoe.bench.cli.options import bounded

if TYPE_CHECKING:
    from ironmoe.bench.data.sets import AnyData

Labels = Annotated[
    Path | None,
    typer.Option(
        help="For a flat folder in --data: a table with a file and a label in each line, as CSV, "
        "TSV, text, JSON or JSON lines, where whole numbers are indices of the logits and others "
        "names; or, for ImageNet's validation images, **robustbench** (its list of 5,000) or the "
        "folder of the development kit."
    ),
]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        help="A JSON object, or CSV, from each class of the data to the index of its logit, or to "
        "a name of the model's. By default names are matched, and WordNet's ids to the standard "
        "order of ImageNet."
    ),
]
Resize = Annotated[
    str | None,
    typer.Option(
        help="In place of the model's own: **256** makes the shorter edge so long, **256x320** "
        "stretches to height × width, **none** leaves pictures as they are."
    ),
]
Crop = Annotated[
    str | None,
    typer.Option(
        help="In place of the model's own: the middle that the model sees, **224**, **224x192**, "
        "or **none**."
    ),
]
Interpolation = Annotated[
    str | None,
    typer.Option(
        help="In place of the model's own: **nearest**, **box**, **bilinear**, **hamming**, "
        "**bicubic** or **lanczos**."
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="In place of the model's own: a number, or one for each channel separated by commas, "
        "in units of the pixel range."
    ),
]
Std = Annotated[str | None, typer.Option(help="As --mean, for the division.")]
Workers = Annotated[
    int | None,
    bounded(
        "Processes that decode images, ahead of the attacks. By default one for each core, at most "
        "8; none for a few images.",
        0,
    ),
]


def announce_set(images: "AnyData", console: Console) -> None:
    """Say which set is used."""
    from ironmoe.attacks.data import ImageStream, LoaderStream

    if isinstance(images, ImageStream | LoaderStream):
        return  # its batches are counted as they come
    classes = "" if images.names is None else f", {_counted(len(images.names), 'class', 'es')}"
    console.print(
        f"{images.name}: {_counted(len(images), 'image')}{classes}, fingerprint "
        f"{images.fingerprint[:16]}",
        highlight=False,
        markup=False,
    )


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{plural if count != 1 else ''}"
