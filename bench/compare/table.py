"""``ironmoe table``: the accuracies of several runs in one table, or in several where one would mix
what cannot be compared."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ironmoe.attacks import latex_table
from ironmoe.attacks.results.layout import laid_out
from ironmoe.attacks.results.left_out import left_out
from ironmoe.attacks.results.rows_file import Row, rows_as_text
from ironmoe.bench.common.radii import to_255
from ironmoe.bench.compare.better import radius_in_255
from ironmoe.bench.compare.finished_run import RunError, finished_run
from ironmoe.bench.compare.groups import Group, grouped


def table_of_runs(folders: Sequence[Path], form: str) -> str:
    """The table of these runs, as the content of a file.

    Runs in another norm, on other data or on other images of it get a table of their own; in CSV
    the columns "norm", "data" and "image_set" tell them apart. What else differs is said: in the
    comments of LaTeX, below a table of Markdown, and beside CSV on standard error.

    Args:
        form: "latex" (booktabs), "csv" or "md".

    Raises:
        RunError: a folder holds no finished run, or another form.
    """
    if form.lower() not in FORMATS:
        raise RunError(f"--format must be {', '.join(FORMATS)}, got {form!r}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RunError("RUN must be given once each, got one folder twice")
    return FORMATS[form.lower()](grouped([finished_run(folder) for folder in folders]))


def _latex(groups: Sequence[Group]) -> str:
    tables = []
    for group in groups:
        above = [f"% {line}\n" for line in (group.title, *group.notes)]
        tables.append("".join(above) + latex_table(group.rows))
    return "\n".join(tables)


def _markdown(groups: Sequence[Group]) -> str:
    tables = []
    for group in groups:
        table = laid_out(group.rows)
        radii = ["largest eps" if eps is None else radius_in_255(eps) for eps in table.radii]
        head = [*table.names, "n", "Clean", *radii]
        lines = [head, ["---"] * len(head), *(line for block in table.blocks for line in block)]
        text = "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)
        notes = (f"{group.title}.", *group.notes, *left_out(group.rows, radius_in_255))
        below = "".join(f"\n{note}\n" for note in notes)
        tables.append(text + below)
    return "\n".join(tables)


def _csv(groups: Sequence[Group]) -> str:
    for group in groups:
        for note in (*group.notes, *left_out(group.rows, radius_in_255)):
            print(f"{group.title}: {note}", file=sys.stderr)
    rows: list[Row] = [
        row | {"eps_255": None if row["eps"] is None else round(to_255(row["eps"]), 9)}
        for group in groups
        for row in group.rows
    ]
    return rows_as_text(rows, ".csv")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


FORMATS: dict[str, Callable[[Sequence[Group]], str]] = {
    "latex": _latex,
    "csv": _csv,
    "md": _markdown,
}
