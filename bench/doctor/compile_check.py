"""``ironmoe doctor --compile``: what the compiler makes of every Triton kernel, for chips that need
not be here."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ironmoe.bench.common.files import write_atomically
from ironmoe.bench.common.machine.compiler import check_compiler
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.progress_bars import progress_bars
from ironmoe.bench.common.user_error import UserError
from ironmoe.kernels.tuning import CHIPS, MATRIX

if TYPE_CHECKING:
    from ironmoe.kernels.compile.report import Finding

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


def run_compile_check(
    chips: tuple[str, ...], only: str, out: Path | None, console: Console
) -> bool:
    """Compile the kernels whose names contain ``only``, and print a table for each chip.

    Args:
        out: file for the tables as Markdown, or None.

    Returns:
        True if there is no fault.

    Raises:
        UserError: Triton is missing or interprets, or no kernel has such a name.
    """
    check_compiler("--compile")
    findings = _compile(chips, only, console)
    if not findings:
        raise UserError(f"--only: no kernel's name contains {only!r}")

    for chip in chips:
        console.print(_table(chip, [f for f in findings if f.chip == chip]))

    faults = [(finding, fault) for finding in findings for fault in finding.faults()]
    for finding, fault in faults:
        console.print(
            f"[bold red]FAULT[/] {finding.chip} {finding.kernel} {finding.dtype} {finding.tile}: "
            f"{fault}",
            highlight=False,
        )

    compiler = f"Triton {versions()['triton']}"
    console.print(
        f"{len(findings)} kernels compiled for {', '.join(chips)} by {compiler}: {len(faults)} "
        "faults",
        highlight=False,
    )
    if out is not None:
        write_atomically(out, _markdown(chips, findings, len(faults)))
    return not faults


def _compile(chips: tuple[str, ...], only: str, console: Console) -> "list[Finding]":
    """Compile the kernels and show how far that is."""
    from ironmoe.kernels.compile.report import compile_report

    findings: list[Finding] = []
    with progress_bars(console, transient=True) as bars:
        task = bars.add_task("compiling", total=None, note="")
        for finding, total in compile_report(chips, only):
            findings.append(finding)
            bars.update(
                task,
                total=total,
                completed=len(findings),
                description=f"{finding.chip} {finding.kernel}",
            )
    return findings


def _cells(finding: "Finding") -> tuple[str, ...]:
    f = finding
    pairs = f"{f.warps}, {f.stages}", str(f.registers), f"{f.stack}, {f.spills}"
    return f.kernel, f.dtype, f.tile, *pairs, str(f.shared), str(f.programs), str(f.matrix or "–")


def _table(chip: str, findings: "list[Finding]") -> Table:
    table = Table(
        title=f"{chip}; limits: {_limits(chip)}; matrix: {MATRIX[chip]}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column(COLUMNS[0])
    for column, width in zip((*COLUMNS[1:], "matrix"), WIDTHS, strict=True):
        table.add_column(column, justify="left" if column in COLUMNS[:3] else "right", width=width)
    for finding in findings:
        table.add_row(*_cells(finding), style="red" if finding.faults() else None)
    return table


def _limits(chip: str) -> str:
    return f"no spill, no stack, {CHIPS[chip].shared_memory:,} bytes of shared memory"


def _markdown(chips: tuple[str, ...], findings: "list[Finding]", num_faults: int) -> str:
    found = versions()
    lines = [
        "# What the compiler makes of the kernels",
        "",
        f"Triton {found['triton']}, no GPU needed: `ironmoe doctor --compile --out "
        "docs/compile-report.md`. "
        f"{len(findings)} kernels, {num_faults} faults.",
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
        for finding in (f for f in findings if f.chip == chip):
            *cells, matrix = _cells(finding)
            traffic = ", ".join(map(str, finding.shared_traffic))
            lines.append(f"| {' | '.join((*cells, traffic, matrix))} |")

    return "\n".join(lines) + "\n"
