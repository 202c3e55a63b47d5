"""``ironmoe doctor --compile``: what the compiler makes of every Triton kernel, for chips that need
not be here."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ironmoe.bench.common.durations import in_words
from ironmoe.bench.common.files import write_atomically
from ironmoe.bench.common.machine.compiler import check_compiler
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.processes import Pool
from ironmoe.bench.common.rows.found import check_place
from ironmoe.bench.common.rows.rows_file import Key, Row, RowsFile, rows_file
from ironmoe.bench.common.run_folder import OutputError
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.doctor.compile_tables import TITLE, heading, line, markdown

if TYPE_CHECKING:
    from ironmoe.kernels.compile.report import Finding

SAY_SECONDS = 30.0
TEXTS = ("kernel", "dtype", "tile", "error")
NUMBERS = (
    *("warps", "stages", "registers", "stack", "spills", "shared", "matrix", "programs"),
    *("barriers", "stores", "loads"),
)


def run_compile_check(
    chips: tuple[str, ...],
    only: str,
    out: Path | None,
    console: Console,
    *,
    again: bool = False,
) -> bool:
    """Compile the kernels whose names contain ``only``. Each is printed and kept when it is
    compiled; the same command goes on with those that are left.

    Args:
        out: file for the tables as Markdown, or None.
        again: see ``rows_file``.

    Returns:
        True if there is no fault.

    Raises:
        UserError: Triton is missing or interprets, no kernel has such a name, or a file cannot be
            used.
    """
    check_compiler("--compile")
    if out is not None:
        _check_out(out)
    from ironmoe.kernels.compile.report import jobs_of, kernel_names

    jobs = jobs_of(chips, only)
    if not jobs:
        names = ", ".join(kernel_names(chips))
        raise UserError(f"--only: no kernel's name contains {only!r}; there are {names}")

    keys = [{"chip": chip, "number": number} for chip, number in jobs]
    with rows_file(
        "doctor compile",
        {},
        asked=keys,
        again=again,
        is_finished=lambda row: not row["error"],
        is_whole=_is_whole,
    ) as kept:
        console.print(kept.greeting, highlight=False, markup=False, soft_wrap=True)
        with Pool(os.cpu_count() or 1) as pool:
            _compile(keys, kept, pool, console)
        rows = [row for key in keys if (row := kept.find(key)) is not None]

    faults = sum(len(row["faults"]) for row in rows)
    console.print(
        f"{len(rows)} kernels compiled for {', '.join(chips)} by Triton {versions()['triton']}: "
        f"{faults} faults",
        highlight=False,
    )
    if out is not None:
        write_atomically(out, markdown(chips, rows, faults))
    return not faults


def _check_out(out: Path) -> None:
    """OutputError: the Markdown cannot be written there, or would replace another text."""
    check_place(out)
    if out.exists() and out.stat().st_size and not out.read_bytes().startswith(TITLE.encode()):
        raise OutputError(
            f"{out} holds something else than this report; choose another file with --out"
        )


def _compile(keys: Sequence[Key], kept: RowsFile, pool: Pool, console: Console) -> None:
    """Print what is known, and compile what is not, in the order of the keys."""
    from ironmoe.kernels.compile.report import compile_report

    missing = kept.missing
    findings = compile_report([(key["chip"], key["number"]) for key in missing], pool)
    start = said = time.monotonic()
    chip, done = None, 0
    for key in keys:
        if key["chip"] != chip:
            chip = key["chip"]
            console.print(heading(chip, console))
        row = kept.find(key)
        if row is None or key in missing:
            row = kept.put(key, _row(next(findings)))
            done += 1
        console.print(line(row, console))
        for fault in row["faults"]:
            console.print(f"[bold red]FAULT[/] {row['chip']} {row['kernel']}: ", end="")
            console.print(fault, highlight=False, markup=False)
        if done and time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            left = (said - start) / done * (len(missing) - done)
            console.print(
                f"{done} of {len(missing)} compiled, about {in_words(left)} left", highlight=False
            )


def _is_whole(row: Row) -> bool:
    """Whether the row has everything that is printed of it."""
    numbers, texts = [row.get(name) for name in NUMBERS], [row.get(name) for name in TEXTS]
    faults = row.get("faults")
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and isinstance(faults, list)
        and all(isinstance(text, str) for text in [*texts, *faults])
    )


def _row(finding: "Finding") -> Row:
    """A finding with what follows from it; of the instructions those that the tables count."""
    barriers, stores, loads = finding.shared_traffic
    row: dict[str, Any] = finding._asdict()
    del row["chip"], row["instructions"]
    return row | {
        "programs": finding.programs,
        "barriers": barriers,
        "stores": stores,
        "loads": loads,
        "faults": finding.faults(),
    }
