"""Rows of plain values as CSV and as JSON lines.

A row is a dict with the same keys as the others. None is an empty cell in CSV and null in JSON;
truth values are ``true`` and ``false`` in both, and floats have all their digits. A list of whole
numbers is one in JSON, too, and in CSV a cell in which spaces separate them.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Kind = type | Callable[[str], Any]
ENDINGS = (".csv", ".jsonl")


def rows_as_text(rows: Sequence[Row], ending: str) -> str:
    """The content of a file with that ending, ".csv" or ".jsonl".

    Raises:
        ValueError: another ending.
    """
    if ending not in ENDINGS:
        raise ValueError(f"a file of rows must end in {' or '.join(ENDINGS)}, got {ending!r}")
    if ending == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    if rows:
        writer.writerow(rows[0])
    for row in rows:
        writer.writerow([_cell(row[name]) for name in rows[0]])
    return file.getvalue()


def write_text_rows(rows: Sequence[Row], path: Path | str) -> None:
    """Write rows in the form that the path's ending names. The file is there whole or not at all.

    Raises:
        ValueError: another ending than ".csv" or ".jsonl".
    """
    path = Path(path)
    text = rows_as_text(rows, path.suffix)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(path)


def read_text_rows(path: Path | str, kinds: Mapping[str, Kind]) -> list[Row]:
    """The rows of such a file.

    Args:
        kinds: column → int, float, bool or list, the type of its values, or what makes a value of a
            text; other columns are text. An empty cell of CSV is None.

    Raises:
        ValueError: another ending, or a cell that is no such value. The message names the file.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ValueError(f"a file of rows must end in {' or '.join(ENDINGS)}, got {path.name!r}")

    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                return [json.loads(line) for line in file]
            return [
                {name: _value(cell, kinds.get(name, str)) for name, cell in row.items()}
                for row in csv.DictReader(file)
            ]
    except ValueError as error:
        raise ValueError(f"{path} must be a file of rows: {error}") from error


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value))
    return repr(value) if isinstance(value, float) else str(value)


def _value(cell: str, kind: Kind) -> Any:
    if cell == "":
        return None
    if kind is bool:
        if cell not in ("true", "false"):
            raise ValueError(f"a truth value must be true or false, got {cell!r}")
        return cell == "true"
    if kind is list:
        return [int(number) for number in cell.split()]
    return kind(cell)
