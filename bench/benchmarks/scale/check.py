"""``ironmoe bench scale --check``: counted bytes beside computed ones."""

from collections.abc import Sequence
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ironmoe.bench.benchmarks.scale.gloo import counted_rows
from ironmoe.bench.reports.formats import Row, show_rows

NUMBERS = ("rows", "counts", "exchanges")


def run_check(console: Console, form: str | None) -> None:
    """Run layers in processes of this machine, and print what they sent.

    Raises:
        UserError: a process failed.
        typer.Exit: with code 1, if a number differs from the computed one.
    """
    rows = counted_rows()
    show_rows(rows, form, check_table, console)
    different = [row for row in rows if not row["equal"]]
    if different:
        console.print(f"{len(different)} of {len(rows)} rows differ from what is computed.")
        raise typer.Exit(1)
    console.print(
        f"Counted in processes that exchange tokens through gloo: all {len(rows)} rows, one for "
        "each process, layer and pass, are equal to what is computed. Times are not taken.",
        highlight=False,
    )


def check_table(rows: Sequence[Row]) -> Table:
    """All processes of a layer and pass together."""
    table = Table(
        title="Bytes that processes sent to each other: counted, and computed",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 0),
    )
    table.add_column("processes, layer and pass")
    for name in NUMBERS:
        table.add_column(name, justify="right")
        table.add_column("computed", justify="right")

    together: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        together.setdefault((row["ranks"], row["case"], row["pass"]), []).append(row)
    for (ranks, case, pass_name), of_ranks in together.items():
        sums = (
            sum(row[name][how] for row in of_ranks)
            for name in NUMBERS
            for how in ("counted", "computed")
        )
        table.add_row(f"{ranks} {case}: {pass_name}", *map(str, sums))
    return table
