"""Tables whose columns are declared once, for the terminal, for HTML and for JSON."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.table import Table
from rich.text import Text

T = TypeVar("T")


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column of a table whose rows are made from objects of type ``T``.

    header: what stands above it; cell: the text of a row; entry: the keys and values that a row
    has in report.json, none by default.
    """

    header: str
    cell: Callable[[T], str]
    entry: Callable[[T], dict[str, Any]] = lambda item: {}


def headers(columns: Iterable[Column[T]]) -> list[str]:
    """What stands above the columns."""
    return [column.header for column in columns]


def cells(columns: Iterable[Column[T]], item: T) -> list[str]:
    """The texts of one row."""
    return [column.cell(item) for column in columns]


def entries(columns: Iterable[Column[T]], item: T) -> dict[str, Any]:
    """What report.json says of one row."""
    return {key: value for column in columns for key, value in column.entry(item).items()}


def markdown_table(columns: Sequence[Column[T]], items: Iterable[T]) -> str:
    """A table in Markdown, one row for each item."""
    lines = [headers(columns), ["---"] * len(columns)]
    lines += [cells(columns, item) for item in items]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def terminal_table(
    columns: Sequence[str], *, title: str | None = None, names: int = 1, no_wrap: bool = False
) -> Table:
    """An empty table: ``names`` columns of names on the left, then columns of numbers."""
    table = Table(title=None if title is None else Text(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < names else "right", no_wrap=no_wrap)
    return table
