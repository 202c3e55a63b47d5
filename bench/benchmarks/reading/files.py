"""Files of rows → rows by kind, in every form that benchmarks write."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ironmoe.bench.benchmarks.reading.figures import Row
from ironmoe.bench.benchmarks.reading.kinds import KINDS, Kind, kind_of, text_of
from ironmoe.bench.benchmarks.reading.origins import Facts, facts_of, joined
from ironmoe.bench.common.rows.rows_file import NAME
from ironmoe.bench.common.user_error import UserError

Key = tuple[str, ...]
Block = tuple[Mapping[str, Any], list[Row]]


class RowsError(UserError):
    """A file has no rows that can be read; the message is one line and says what it is."""


class ReadRows(NamedTuple):
    """The rows of one file.

    path: as the user gave it; facts: where they come from; rows: name of the kind → key → rows,
    where the key has the values of ``kind.keys`` in words, and several rows are runs of one thing.
    """

    path: Path
    facts: Facts
    rows: dict[str, dict[Key, list[Row]]]

    @property
    def repeated(self) -> int:
        """How many keys have several rows."""
        return sum(len(rows) > 1 for of_kind in self.rows.values() for rows in of_kind.values())

    @property
    def kinds(self) -> list[Kind]:
        return [kind for kind in KINDS if kind.name in self.rows]


def read_rows(path: Path) -> ReadRows:
    """Read a file of JSON or CSV, or ``rows.json`` in a folder.

    Raises:
        RowsError: there are no rows of a benchmark in it.
    """
    content = _content(path)
    blocks = list(_blocks(content))
    rows: dict[str, dict[Key, list[Row]]] = {}
    for _, found in blocks:
        for written in found:
            if (kind := kind_of(written)) is None:
                continue
            for row in kind.split(written):
                key = tuple(text_of(row.get(name)) for name in kind.keys)
                rows.setdefault(kind.name, {}).setdefault(key, []).append(row)

    if not rows:
        raise RowsError(f"{path} has no rows of ironmoe bench{_what_else(content)}")
    return ReadRows(path, joined(facts_of(about) for about, _ in blocks), rows)


def _content(path: Path) -> Any:
    file = path / NAME if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        where = f" (a folder must hold {NAME})" if path.is_dir() else ""
        raise RowsError(f"{file} cannot be read: {error.strerror or error}{where}") from None
    except UnicodeDecodeError:
        raise RowsError(f"{file} must be JSON or CSV, and is no text") from None

    if file.suffix.lower() == ".csv":
        try:
            return [_unflattened(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        except csv.Error as error:
            raise RowsError(f"{file} must be CSV: {error}") from None
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowsError(f"{file} must be JSON, or CSV with the ending .csv: {error}") from None


def _blocks(content: Any) -> Iterator[Block]:
    """Every list of rows, with the dict beside which it stands."""
    if isinstance(content, list):
        dicts = [entry for entry in content if isinstance(entry, Mapping)]
        if any(map(_has_rows, dicts)):  # each was measured on another occasion
            for entry in dicts:
                yield from _blocks(entry)
        elif dicts:
            yield {}, dicts
    elif isinstance(content, Mapping):
        if isinstance(content.get("benchmarks"), list):
            entries = [entry for entry in content["benchmarks"] if isinstance(entry, Mapping)]
            yield content, [_of_pytest_benchmark(entry) for entry in entries]
        elif _has_rows(content):
            yield content, [row for row in content["rows"] if isinstance(row, Mapping)]
        else:
            for part in content.values():
                if isinstance(part, list) and any(map(_has_rows, part)):
                    yield from _blocks(part)


def _has_rows(entry: Any) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("rows"), list)


def _of_pytest_benchmark(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """One benchmark of pytest-benchmark, whose times are in seconds, with its quartiles."""
    stats = entry.get("stats")
    stats = stats if isinstance(stats, Mapping) else {}
    milliseconds = {
        name: 1e3 * stats[of]
        for name, of in (("ms", "median"), ("p25", "q1"), ("p75", "q3"))
        if isinstance(stats.get(of), int | float)
    }
    return {
        "group": entry.get("group"),
        "benchmark": entry.get("name"),
        "runs": stats.get("rounds"),
        **milliseconds,
    }


def _unflattened(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a CSV file, whose columns "outer.inner" become a dict again, at every depth. An
    empty cell is left out: a row without this entry has one, too."""
    found: dict[str, Any] = {}
    for column, text in row.items():
        if not column or text in (None, ""):
            continue
        *outer, last = column.split(".")
        inside = found
        for name in outer:
            if not isinstance(inside.get(name), dict):
                inside[name] = {}
            inside = inside[name]
        inside[last] = _value(text)
    return found


def _value(text: str) -> Any:
    """A cell: a number, numbers in a list, True, False, or text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return json.loads(f"[{text}]")
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def _what_else(content: Any) -> str:
    """What a file without rows may be, for the message."""
    keys = content.keys() if isinstance(content, Mapping) else set()
    if {"arms", "verdicts"} <= keys:
        return ": it holds the numbers of ironmoe study, whose page compares its models"
    if {"title", "settings"} <= keys:
        return ": it is a report; ironmoe compare takes two runs of ironmoe attack"
    return f"; it must be of {', '.join(kind.name for kind in KINDS)}"
