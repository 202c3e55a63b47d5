"""Compiled kernels as lines of a terminal, and as Markdown."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.rows.rows_file import Row
from ironmoe.kernels.tuning import CHIPS, MATRIX

COLUMNS = (
    "kernel",
    "dtype",
    "tile",
    "warps, stages",
    "regs",
    "stack, spills",
    "shared bytes",
    "an SM",
)
# of all but the first, so that a terminal of 80 columns holds the table
WIDTHS = (5, 10, 6, 4, 6, 6, 2, 6)
LEAST_WIDTH = 20  # of the first
TITLE = "# What the compiler makes of the kernels\n"


def heading(chip: str, console: Console) -> Table:
    """What stands above the lines of a chip."""
    table = _table(console, show_header=True)
    table.title = f"{chip}; limits: {_limits(chip)}; matrix: {MATRIX[chip]}"
    return table


def line(row: Row, console: Console) -> Table:
    """One kernel, in the columns of the heading."""
    table = _table(console, show_header=False)
    table.add_row(*_cells(row), style="red" if row["faults"] else None)
    return table


def markdown(chips: tuple[str, ...], rows: Sequence[Row], num_faults: int) -> str:
    """All kernels, for docs/compile-report.md."""
    found = versions()
    lines = [
        TITLE,
        f"Triton {found['triton']}, no GPU needed: `ironmoe doctor --compile --out "
        "docs/compile-report.md`. "
        f"{len(rows)} kernels, {num_faults} faults.",
        "",
        "A fault is a spill, a stack in local memory, more shared memory than the chip has, or a "
        "16-bit matrix kernel with 64 rows or more "
        "a tile that lacks the chip's matrix instruction.",
        "Regs are registers a thread; spills are instructions on local memory (AMD: spilled "
        "vector registers); an SM: programs that one SM or CU",
        "holds at the same time. The last two columns count instructions in the code: barriers, "
        "stores to and loads from shared memory; matrix",
        "instructions. These are facts about compiled code, not speed.",
    ]

    for chip in chips:
        header = (*COLUMNS, "barriers, stores, loads", MATRIX[chip])
        lines += ["", f"## {chip}", "", f"Limits: {_limits(chip)}.", ""]
        lines += [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
        for row in (row for row in rows if row["chip"] == chip):
            *cells, matrix = _cells(row)
            traffic = f"{row['barriers']}, {row['stores']}, {row['loads']}"
            lines.append(f"| {' | '.join((*cells, traffic, matrix))} |")

    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    pairs = f"{row['warps']}, {row['stages']}", f"{row['stack']}, {row['spills']}"
    return (
        *(row["kernel"], row["dtype"], row["tile"], pairs[0], str(row["registers"]), pairs[1]),
        *(str(row["shared"]), str(row["programs"]), str(row["matrix"] or "–")),
    )


def _table(console: Console, *, show_header: bool) -> Table:
    table = Table(title_justify="left", box=None, show_header=show_header, padding=(0, 1, 0, 0))
    first = max(LEAST_WIDTH, console.width - sum(WIDTHS) - len(WIDTHS) - 1)
    for column, width in zip((*COLUMNS, "matrix"), (first, *WIDTHS), strict=True):
        table.add_column(column, justify="left" if column in COLUMNS[:3] else "right", width=width)
    return table


def _limits(chip: str) -> str:
    return f"no spill, no stack, {CHIPS[chip].shared_memory:,} bytes of shared memory"
