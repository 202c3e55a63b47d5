"""``ironmoe runs``: it reads its options and calls ``runs/``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ironmoe.bench.common.errors import clear_errors


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where runs lie.")] = Path(
        "runs"
    ),
    form: Annotated[
        str | None,
        typer.Option("--format", help="csv, json or md, in place of text for people."),
    ] = None,
) -> None:
    """List the runs in a folder: model, data, norm, radii, date, how far, and what came out.

    Example:

        ironmoe runs
    """
    console = Console()
    with clear_errors(console, goes_on=False):
        from ironmoe.bench.listing.listing import show_runs

        show_runs(folder, form, console)
