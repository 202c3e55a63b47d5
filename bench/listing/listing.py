"""The runs below a folder, as rows and as a table."""

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from ironmoe.bench.common.radii import exact
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.listing.found import REPORT, ROWS, SETTINGS, read_json, run_folders
from ironmoe.bench.listing.kinds import KINDS, kind_of
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.formats import checked_format, written_rows

Row = dict[str, Any]


class RunsError(UserError):
    """The folder cannot be searched; the message says why."""


def show_runs(folder: Path, form: str | None, console: Console) -> list[Row]:
    """Print what lies in a folder of runs, the newest last: on the terminal, or in a format.

    Args:
        form: "csv", "json" or "md"; None: text for people.

    Raises:
        UserError: there is no such folder or format.
    """
    form = checked_format(form)
    if not folder.is_dir():
        hint = "; runs are made by ironmoe demo, attack, train and study" * (not folder.exists())
        raise RunsError(f"FOLDER must be a folder, got {folder}{hint}")
    rows = runs_in(folder)
    if form is not None:
        console.out(written_rows(rows, form), end="", highlight=False)
        return rows

    for row in rows:
        console.print(_told(row), soft_wrap=True)
    unfinished = sum(row["complete"] is False for row in rows)
    console.print(
        f"{counted(len(rows), 'run')} in {folder}, {unfinished} unfinished.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return rows


def runs_in(folder: Path) -> list[Row]:
    """A row for each run, by date.

    Keys: "date" (UTC, ISO 8601: of the report, else of the newest file of the settings), "kind",
    "model", "data", "norm", "eps_255", "complete" (None where the run does not say it), "state",
    "verdict" and "path". What a run does not have is None.
    """
    rows = [row for path in run_folders(folder) if (row := _row(path)) is not None]
    return sorted(rows, key=lambda row: (row["date"], row["path"]))


def _row(path: Path) -> Row | None:
    settings, rows = read_json(path / SETTINGS), read_json(path / ROWS)
    report = read_json(path / REPORT) or rows
    kind = kind_of(settings, report)
    if kind is None:
        return None
    try:
        about = KINDS[kind](path, settings, report)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError) as error:
        about = {"complete": None, "state": f"cannot be read: {type(error).__name__} {error}"}
    known = {"date": _date(path, report), "kind": kind, "data": _data(settings)}
    names = ("date", "kind", "model", "data", "norm", "eps_255", "complete", "state", "verdict")
    row = known | about
    return {name: row.get(name) for name in names} | {"path": str(path)}


def _data(settings: Row) -> str | None:
    data = settings.get("data")
    return data if isinstance(data, str) else None


def _date(path: Path, report: Row) -> str:
    made = report.get("made")
    date = made.get("date") if isinstance(made, dict) else None
    if isinstance(date, str):
        return date
    files = [path / name for name in (SETTINGS, REPORT, ROWS)]
    latest = max(file.stat().st_mtime for file in files if file.exists())
    return datetime.fromtimestamp(latest, timezone.utc).isoformat(timespec="seconds")


def _told(row: Row) -> Group:
    eps = "" if not row["eps_255"] else f" at {_radii(row['eps_255'])}"
    about = [row["kind"], row["model"], row["data"], f"{row['norm']}{eps}" if row["norm"] else None]
    head = Text(f"{row['date'][:16].replace('T', ' ')}  {row['path']}", style="bold")
    lines = [", ".join(part for part in about if part), row["state"], row["verdict"]]
    return Group(head, *(Text(f"  {line}") for line in lines if line))


def _radii(eps_255: Sequence[float]) -> str:
    return f"{', '.join(exact(float(eps)) for eps in eps_255)} of 255"
