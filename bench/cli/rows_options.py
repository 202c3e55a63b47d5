"""Options of the commands that print rows."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Shapes = Annotated[
    list[str] | None,
    typer.Option(
        help="Layers: names separated by commas, or one layer as five numbers **T,d,n,E,K**: "
        "tokens, width, hidden width, experts, choices of a token (SwiGLU, no biases). The option "
        "may be repeated."
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Print the rows as **csv**, **json** or **md** (Markdown) in place of a table. "
        "Standard output then has nothing else.",
    ),
]
RowsOut = Annotated[
    Path | None,
    typer.Option(
        help="File of the rows, as JSON, written after each. By default runs/…/rows.json."
    ),
]
Again = Annotated[
    bool, typer.Option("--again", help="Measure anew what an earlier command has measured.")
]


def notes_console(form: str | None) -> Console:
    """Where a command prints what is no row: standard error if the rows have a format."""
    return Console(stderr=form is not None)
