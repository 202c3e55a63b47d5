"""A flat folder of images, and a table that names the label of each file: CSV, TSV, text or
JSON."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ironmoe.attacks.data.decoding import SUFFIXES
from ironmoe.attacks.data.errors import DataError
from ironmoe.attacks.data.files import ImageFiles, is_image

FILE_COLUMNS = ("file", "filename", "file_name", "image", "imageid", "image_id", "path", "id")
LABEL_COLUMNS = (
    "label", "labels", "class", "class_name", "target", "category", "synset", "wnid",
    "predictionstring",
)  # fmt: skip
"""What the columns of a table may be called, in small letters; without such names the first two
columns count."""

TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl")
USUAL = ("labels", "metadata")
"""A table of this name in the folder itself is found by itself."""


def labelled_files(folder: Path | str, table: Path | str | None = None) -> ImageFiles:
    """The images that a table lists, in its order.

    Labels that are whole numbers are indices of the logits, others are names. Images that the table
    does not list are left out, and ``notes`` says how many.

    Args:
        folder: what the files in the table are relative to; a name without its ending is enough.
        table: ``.csv``, ``.tsv`` or ``.txt`` with a file and a label in each line; or ``.json``, an
            object from file to label or a list of objects; or ``.jsonl``. None: ``labels.…`` or
            ``metadata.…`` in the folder.

    Raises:
        DataError: there is no table, it cannot be read, or it lists a file that is not there, or
            one twice with two labels.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"a folder of images must exist, got {folder}")
    path = _usual_table(folder) if table is None else Path(table)
    pairs = _pairs(path)
    if not pairs:
        raise DataError(f"{path} must list files with their labels, got no line of them")

    there = {
        os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")
        for root, _, names in os.walk(folder)
        for name in names
        if is_image(name)
    }
    by_stem: dict[str, list[str]] = {}
    for file in sorted(there):
        by_stem.setdefault(os.path.splitext(file)[0], []).append(file)

    listed: dict[str, str | int] = {}
    missing: list[str] = []
    for told, label in pairs:
        file = _below(told, folder)
        found = [file] if file in there or (folder / file).is_file() else by_stem.get(file, [])
        if len(found) > 1:
            raise DataError(f"{path} must name one file, got {told!r}, which may be {found}")
        if not found:
            missing.append(told)
        elif listed.setdefault(found[0], label) != label:
            raise DataError(
                f"{path} must list each file with one label, got {told!r} with "
                f"{listed[found[0]]!r} and {label!r}"
            )
    if missing:
        headed = missing == [pairs[0][0]] and len(pairs) > 1
        raise DataError(
            f"{path} must list files of {folder}, got {len(missing)} that are not there, the "
            f"first {missing[0]!r}"
            + f". If its first line names the columns, call them {FILE_COLUMNS[0]!r} and "
            f"{LABEL_COLUMNS[0]!r}" * headed
        )

    labels, names = _numbered(list(listed.values()), path)
    rest = len(there - listed.keys())
    notes = [f"{rest} images are left out, because {path.name} does not list them."] * (rest > 0)
    return ImageFiles(folder.resolve().name, folder, list(listed), labels, names, notes)


def _below(file: str, folder: Path) -> str:
    """A path of the table, such as "./a.png" or a whole one, as one below the folder."""
    if os.path.isabs(file):
        file = os.path.relpath(file, folder.absolute())
    return os.path.normpath(file).replace(os.sep, "/")


def has_usual_table(folder: Path) -> bool:
    """Whether the folder has a table of its labels."""
    return any((folder / f"{name}{kind}").is_file() for name in USUAL for kind in TABLES)


def _usual_table(folder: Path) -> Path:
    found = [
        folder / f"{name}{kind}"
        for name in USUAL
        for kind in TABLES
        if (folder / f"{name}{kind}").is_file()
    ]
    if len(found) != 1:
        raise DataError(
            f"{folder} must hold one table of labels, such as labels.csv, got "
            f"{[path.name for path in found] or 'none'}"
        )
    return found[0]


def _pairs(path: Path) -> list[tuple[str, str | int]]:
    """The (file, label) pairs of a table, in its order."""
    if path.suffix.lower() not in TABLES:
        raise DataError(f"a table of labels must end in {', '.join(TABLES)}, got {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _json_rows(text, path) if "json" in path.suffix.lower() else _text_rows(text, path)
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as a table of labels: {error}") from error
    return [(file.replace("\\", "/"), _label(label, path)) for file, label in rows]


def _text_rows(text: str, path: Path) -> list[tuple[str, Any]]:
    lines = [line for line in text.split("\n") if line.strip()]
    delimiter = _delimiter(lines, path.suffix.lower())
    if delimiter is None:
        split = [_words(line) for line in lines]
    else:
        cells = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        split = [row for row in cells if any(cell.strip() for cell in row)]

    if not split:
        return []
    columns = _columns([name.strip().lower() for name in split[0]])
    rows = split[1:] if columns else split
    file, label = columns or (0, 1)
    short = next((row for row in rows if len(row) <= max(file, label)), None)
    if short is not None:
        raise DataError(f"{path} must have a file and a label in each line, got {short}")
    return [(row[file].strip(), row[label].strip()) for row in rows]


def _delimiter(lines: Sequence[str], kind: str) -> str | None:
    """What parts the columns; None: spaces."""
    first = lines[0] if lines else ""
    if kind == ".tsv" or "\t" in first:
        return "\t"
    if kind == ".csv":
        return ";" if ";" in first and "," not in first else ","  # where a comma is in numbers
    return "," if all("," in line for line in lines) else None


def _words(line: str) -> list[str]:
    """File and label of a line of text: a number at its end is the label, whatever the file's name
    is; else the file ends where its name does, or with the first word."""
    words = line.strip().rsplit(maxsplit=1)
    if re.fullmatch(r"[+-]?\d+", words[-1]):
        return words
    named = re.fullmatch(
        rf"(.+?(?:{'|'.join(map(re.escape, SUFFIXES))}))\s+(.+)", line.strip(), re.I
    )
    return [named[1], named[2]] if named else line.split(maxsplit=1)


def _json_rows(text: str, path: Path) -> list[tuple[str, Any]]:
    if path.suffix.lower() == ".jsonl":
        lines = [line for line in text.split("\n") if line.strip()]
        found: Any = [json.loads(line, object_pairs_hook=_once) for line in lines]
    else:
        found = json.loads(text, object_pairs_hook=_once)
    if isinstance(found, dict):
        return list(found.items())

    rows: list[tuple[str, Any]] = []
    for entry in found if isinstance(found, list) else [found]:
        if isinstance(entry, dict):
            names = list(entry)
            columns = _columns([name.lower() for name in names])
            if columns:
                rows.append((str(entry[names[columns[0]]]), entry[names[columns[1]]]))
                continue
        elif isinstance(entry, list) and len(entry) == 2:
            rows.append((str(entry[0]), entry[1]))
            continue
        raise DataError(
            f"{path} must be an object from file to label, or a list of objects with "
            f"{FILE_COLUMNS[0]!r} and {LABEL_COLUMNS[0]!r}, got {entry!r}"
        )
    return rows


def _columns(names: Sequence[str]) -> tuple[int, int] | None:
    """Where the file and the label stand, if the names say so."""
    files = [names.index(name) for name in FILE_COLUMNS if name in names]
    labels = [names.index(name) for name in LABEL_COLUMNS if name in names]
    return (files[0], labels[0]) if files and labels else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no name stands twice with two values."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise DataError(
                f"a table of labels must list each file with one label, got {name!r} with "
                f"{found[name]!r} and {value!r}"
            )
    return found


def _label(value: Any, path: Path) -> str | int:
    """A whole number, or a name. Of Kaggle's "n01440764 1 2 3 4 n01440764 5 6 7 8" the boxes are
    left out. Programs that know floats alone write 3 as 3.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"labels in {path} must be whole numbers or names, got {value!r}")
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.0+)?", value):
        value = int(float(value)) if "." in value else int(value)
    if isinstance(value, int):
        if value < 0:
            raise DataError(f"labels in {path} must be at least 0, got {value}")
        return value
    if not value.strip():
        raise DataError(f"labels in {path} must be whole numbers or names, got an empty one")

    if not re.fullmatch(r"(n\d{8}(?: \d+){4} ?)+", value):
        return value
    kinds = sorted(set(re.findall(r"n\d{8}", value)))
    if len(kinds) > 1:
        raise DataError(f"labels in {path} must be one for each file, got {' and '.join(kinds)}")
    return kinds[0]


def _numbered(labels: list[str | int], path: Path) -> tuple[list[int], list[str] | None]:
    """(numbers, names): names get numbers in their alphabetical order."""
    whole = [label for label in labels if isinstance(label, int)]
    if len(whole) == len(labels):
        return whole, None
    if whole:
        name = next(label for label in labels if isinstance(label, str))
        raise DataError(
            f"labels in {path} must all be whole numbers or all be names, got {whole[0]} and "
            f"{name!r}"
        )
    names = sorted({str(label) for label in labels})
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[str(label)] for label in labels], names
