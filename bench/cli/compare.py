"""``ironmoe compare`` and ``ironmoe table``: they read their options and call ``compare/``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ironmoe.bench.common.errors import clear_errors

First = Annotated[Path, typer.Argument(metavar="A", help="The folder of a run of ironmoe attack.")]
Second = Annotated[
    Path,
    typer.Argument(
        metavar="B", help="Another one, or a second model's. Differences are A minus B."
    ),
]


def compare(
    one: First,
    other: Second,
    confidence: Annotated[float, typer.Option(help="Of the intervals, between 0 and 1.")] = 0.95,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON in place of the table.")
    ] = False,
) -> None:
    r"""Compare two runs of ironmoe attack on the same images, such as two models under the same
    attacks.

    The difference of each accuracy stands with an interval and a p-value for paired data: McNemar's
    exact test asks whether the images that only one run gets right are shared out evenly.

    Example:

        ironmoe compare runs/attack-vit-1a2b3c4d \
            runs/attack-v-moe-5e6f7a8b
    """
    console = Console()
    with clear_errors(console, goes_on=False):
        if not 0 < confidence < 1:
            raise typer.BadParameter(f"--confidence must lie between 0 and 1, got {confidence}")
        from ironmoe.bench.compare.compare import run_compare_command

        run_compare_command(one, other, confidence=confidence, as_json=as_json, console=console)


def table(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN …", help="Folders of runs of ironmoe attack.")
    ],
    form: Annotated[
        str, typer.Option("--format", help="latex (for booktabs), csv or md.")
    ] = "latex",
) -> None:
    """Print the accuracies of several runs of ironmoe attack as one table for a paper.

    Example:

        ironmoe table runs/attack-* > table.tex
    """
    with clear_errors(Console(), goes_on=False):
        from ironmoe.bench.compare.table import table_of_runs

        typer.echo(table_of_runs(runs, form), nl=False)
