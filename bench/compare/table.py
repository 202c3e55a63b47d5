"""``ironmoe table``: the accuracies of several runs in one table."""

from collections.abc import Sequence
from pathlib import Path

from ironmoe.attacks import latex_table
from ironmoe.attacks.results.rows_file import Row, rows_as_text
from ironmoe.bench.compare.finished_run import RunError, finished_run, told_apart

FORMATS = ("latex", "csv")


def table_of_runs(folders: Sequence[Path], form: str) -> str:
    """The table of these runs, as the content of a file.

    form: "latex" (booktabs) or "csv".

    Raises:
        RunError: a folder holds no finished run, or another form.
    """
    if form not in FORMATS:
        raise RunError(f"--format must be {' or '.join(FORMATS)}, got {form!r}")
    runs = [finished_run(folder) for folder in folders]
    rows: list[Row] = [
        row | {"model": name}
        for name, run in zip(told_apart(runs), runs, strict=True)
        for row in run.accuracies()
    ]
    return latex_table(rows) if form == "latex" else rows_as_text(rows, ".csv")
