"""``ironmoe bench compare`` and ``bench plot``: they read their options and call
``benchmarks/reading/``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ironmoe.bench.cli.benchmarks.rows_options import Format, notes_console
from ironmoe.bench.common.errors import clear_errors

Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Rows alone whose names have this text, such as **float32** or **mixtral**. The "
        "option may be repeated: then they must have all of them."
    ),
]
ROWS = "A file of rows that a command of ironmoe bench has written, as JSON or CSV, or its folder."


def bench_compare(
    a: Annotated[Path, typer.Argument(metavar="A", help=ROWS)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The file that is compared with it.")],
    only: Only = None,
    form: Format = None,
) -> None:
    """Compare two files of rows: the ratio of each figure, whether it is more than noise, and what
    else differs: machine, versions, settings.

    Files of other machines are compared, too, and the first lines say so.

    Example:

        ironmoe bench compare before.json after.json --only float32
    """
    console = notes_console(form)
    with clear_errors(console):
        from ironmoe.bench.benchmarks.reading.comparison import compare_files
        from ironmoe.bench.benchmarks.reading.comparison_table import show_comparison
        from ironmoe.bench.reports.formats import checked_format

        form = checked_format(form)
        typer.echo(show_comparison(compare_files(a, b, only or ()), form, console), nl=False)


def bench_plot(
    files: Annotated[list[Path], typer.Argument(metavar="FILE …", help=ROWS)],
    out: Annotated[
        Path, typer.Option(help="The picture, which ends in **.png**, **.svg** or **.pdf**.")
    ] = Path("rows.png"),
    figure: Annotated[
        str | None,
        typer.Option(
            help="Which figure is drawn, such as **peak_mb** or **robust**. By default the time, "
            "the rate or the robust accuracy."
        ),
    ] = None,
    only: Only = None,
) -> None:
    """Draw files of rows as bars, or as points on a logarithmic scale; several files stand side by
    side on one scale.

    A thin line at a bar shows how far its runs scatter, as far as that was measured.

    Example:

        ironmoe bench plot before.json after.json --out rows.png
    """
    console = Console()
    with clear_errors(console):
        from ironmoe.bench.benchmarks.reading.plot import (
            checked_picture,
            draw_files,
            without_a_common_row,
        )
        from ironmoe.bench.reports.style import save_picture

        file = checked_picture(out)
        save_picture(draw_files(files, figure, only or ()), file)
        console.print(f"Wrote {file}", highlight=False, markup=False, soft_wrap=True)
        if warning := without_a_common_row(files, only or ()):
            Console(stderr=True).print(warning, highlight=False, markup=False, soft_wrap=True)
