"""Tables whose columns are declared once, for the terminal, for HTML and for JSON."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.measure import measure_renderables
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
ANY_WIDTH = 10_000


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


def print_table(table: Table, console: Console) -> None:
    """Print a table in which no number and no word is cut.

    In a terminal that is too narrow, cells break between words, the widest columns first; a column
    with ``no_wrap`` stays as it is. If that is not enough, every row becomes a block with a line
    for each cell. A file or a pipe has no width: its lines are as long as the table.
    """
    options = console.options.update(max_width=ANY_WIDTH)
    measured = [
        measure_renderables(console, options, [column.header, *column.cells])
        for column in table.columns
    ]
    widths = [size.maximum for size in measured]
    least = [
        size.maximum if column.no_wrap else size.minimum
        for size, column in zip(measured, table.columns, strict=True)
    ]
    between = table.__rich_measure__(console, options).maximum - sum(widths)
    room = (console.width if console.is_terminal else ANY_WIDTH) - between
    if sum(least) > room:
        _print_blocks(table, console)
        return

    while sum(widths) > room:
        widest = max(
            (at for at in range(len(widths)) if widths[at] > least[at]), key=widths.__getitem__
        )
        widths[widest] -= 1
    table.width = sum(widths) + between
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    console.print(table, crop=False)


def _print_blocks(table: Table, console: Console) -> None:
    """A block for each row: its first cell, and below it a line for each of the others, after the
    header of its column. A name that stands in the first of several rows alone stands in each."""
    if table.title:
        console.print(table.title, style="italic")
    heads = [column.header if table.show_header else "" for column in table.columns]
    name: Any = ""
    for row in zip(*(column.cells for column in table.columns), strict=True):
        name = row[0] or name
        for number, (head, cell) in enumerate(zip(heads, (name, *row[1:]), strict=True)):
            if not cell:
                continue
            line = Text("  " * (number > 0), style="" if number else "bold")
            for text in (head, ": ") if head else ():
                line += console.render_str(text) if isinstance(text, str) else text
            line += console.render_str(cell) if isinstance(cell, str) else cell
            console.print(line, highlight=False, overflow="ignore", crop=False)
