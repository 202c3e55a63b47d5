"""Rows as text that other programs read: CSV, JSON or Markdown."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ironmoe.bench.common.files import finite
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.reports.tables import print_table

Row = Mapping[str, Any]
DIGITS = 6  # of a number in Markdown, which people read


def checked_format(name: str | None) -> str | None:
    """The format in lower case; None is the table of the terminal.

    Raises:
        UserError: there is no such format.
    """
    if name is None or name.lower() in FORMATS:
        return None if name is None else name.lower()
    raise UserError(f"--format must be {', '.join(FORMATS)}, got {name!r}")


def written_rows(rows: Iterable[Row], form: str) -> str:
    """The rows as text that ends with a line break.

    In CSV and Markdown an inner dict becomes columns such as "milliseconds.dense", and a list one
    cell with commas. The columns are those of all rows, in the order in which they first appear; a
    cell is empty where a row has no such entry, or where it is None, NaN or infinite. JSON keeps
    dicts and lists, and has null there.

    Args:
        form: one of FORMATS.
    """
    return FORMATS[form](list(rows))


def show_rows(
    rows: Sequence[Row],
    form: str | None,
    table: Callable[[Sequence[Row]], Table],
    console: Console,
) -> None:
    """Print the rows: in their format on standard output, or without one as a table."""
    if form is None:
        print_table(table(rows), console)
    else:
        sys.stdout.write(written_rows(rows, form))
        sys.stdout.flush()


def flat(row: Row) -> dict[str, Any]:
    """The row with "outer.inner" in place of inner dicts, and with text in place of lists."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": entry for inner, entry in flat(value).items()}
        elif isinstance(value, list | tuple):
            found[key] = ",".join(map(_entry, value))
        else:
            found[key] = value
    return found


def columns(rows: Iterable[Row]) -> list[str]:
    """The keys of all rows, in the order in which they first appear."""
    return list(dict.fromkeys(key for row in rows for key in row))


def _entry(value: Any) -> str:
    """One of a list, as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _csv(rows: Sequence[Row]) -> str:
    flattened = [flat(finite(dict(row))) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(flattened), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flattened)
    return text.getvalue()


def _json(rows: Sequence[Row]) -> str:
    content = finite([dict(row) for row in rows])
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _markdown(rows: Sequence[Row]) -> str:
    flattened = [flat(finite(dict(row))) for row in rows]
    names = columns(flattened)
    lines = [names, ["---"] * len(names)]
    lines += [[_cell(row.get(name)) for name in names] for row in flattened]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}"
    return " ".join(str(value).split()).replace("|", "\\|")


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    "csv": _csv,
    "json": _json,
    "md": _markdown,
}
"""The value of ``--format`` → rows as text."""
