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
from ironmoe.attacks.data.files import ImageFiles, files_below, is_image
from ironmoe.attacks.data.image_set import LARGEST_LABEL

FILE_COLUMNS = ("file", "filename", "file_name", "image", "imageid", "image_id", "path", "id")
LABEL_COLUMNS = (
    "label", "labels", "class", "class_name", "target", "category", "synset", "wnid",
    "predictionstring",
)  # fmt: skip
"""What the columns of a table may be called, in small letters; without such names the first two
columns count."""

TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl")
WHOLE = re.compile(r"[+-]?\d+(\.0+)?")
NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf(inity)?)", re.IGNORECASE)
"""How a label is written that is a number. ``WHOLE`` is nothing else, whatever stands beside it."""

USUAL = ("labels", "metadata")
"""A table of this name in the folder itself is found by itself."""


def labelled_files(folder: Path | str, table: Path | str | None = None) -> ImageFiles:
    """The images that a table lists, in its order.

    Labels that are all numbers, such as 3, 3.0 or 3e0, are indices of the logits; others are names.
    Images that the table does not list are left out, and ``notes`` says how many.

    Args:
        folder: what the files in the table are relative to; a name without its ending is enough.
        table: ``.csv``, ``.tsv`` or ``.txt`` with a file and a label in each line; or ``.json``, an
            object from file to label or a list of objects; or ``.jsonl``. None: ``labels.…`` or
            ``metadata.…`` in the folder.

    Raises:
        DataError: there is no table, it cannot be read, or it lists a file that is not there, or
            one twice with two labels, or a label that is a fraction.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"a folder of images must exist, got {folder}")
    path = _usual_table(folder) if table is None else Path(table)
    pairs = _pairs(path)
    if not pairs:
        raise DataError(f"{path} must list files with their labels, got no line of them")

    there = _Files(folder)
    found = [there.called(told) for told, _ in pairs]
    missing = [told for (told, _), files in zip(pairs, found, strict=True) if not files]
    if missing:
        headed = missing == [pairs[0][0]] and len(pairs) > 1
        raise DataError(
            f"{path} must list files of {folder}, got {len(missing)} that are not there, the "
            f"first {missing[0]!r}"
            + f". If its first line names the columns, call them {FILE_COLUMNS[0]!r} and "
            f"{LABEL_COLUMNS[0]!r}" * headed
        )

    labels, names = _numbered(pairs, path)
    listed: dict[str, int] = {}
    for (told, _), files, label in zip(pairs, found, labels, strict=True):
        if len(files) > 1:
            raise DataError(f"{path} must name one file, got {told!r}, which may be {files}")
        if listed.setdefault(files[0], label) != label:
            both = [each if names is None else names[each] for each in (listed[files[0]], label)]
            raise DataError(
                f"{path} must list each file with one label, got {told!r} with {both[0]!r} and "
                f"{both[1]!r}"
            )

    rest = len(there.images - listed.keys())
    again = len(pairs) - len(listed)
    notes = [
        *[f"{rest} images are left out, because {path.name} does not list them."] * (rest > 0),
        *[f"{again} lines of {path.name} list a file again, with the same label."] * (again > 0),
    ]
    if names is not None and WHOLE.fullmatch(names[0]):
        notes.append(f"Labels of {path.name} begin at {names[0]}, so they are names of classes.")
    return ImageFiles(
        folder.resolve().name, folder, list(listed), list(listed.values()), names, notes
    )


def files_listed(folder: Path, table: Path) -> set[str]:
    """Those files of the folder that the table lists; none if it is no table of labels."""
    try:
        pairs = _pairs(table)
    except DataError:
        return set()
    there = _Files(folder)
    return {file for told, _ in pairs for file in there.called(told)}


def usual_tables(folder: Path) -> list[Path]:
    """The files in the folder that are called as a table of its labels is."""
    paths = [folder / f"{name}{kind}" for name in USUAL for kind in TABLES]
    return [path for path in paths if path.is_file()]


class _Files:
    """The files in a folder, by what tables may call them. ``images``: those that are images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = {file for file in files_below(folder) if is_image(os.path.basename(file))}
        self._by_stem: dict[str, list[str]] = {}
        for file in sorted(self.images):
            self._by_stem.setdefault(os.path.splitext(file)[0], []).append(file)

    def called(self, told: str) -> list[str]:
        """The files that a path may mean, such as "./a.png", "a", or a whole one."""
        if os.path.isabs(told):
            told = os.path.relpath(told, self.folder.absolute())
        file = os.path.normpath(told).replace(os.sep, "/")
        if file in self.images or (self.folder / file).is_file():
            return [file]
        return self._by_stem.get(file, [])


def _usual_table(folder: Path) -> Path:
    found = usual_tables(folder)
    if len(found) != 1:
        raise DataError(
            f"{folder} must hold one table of labels, such as labels.csv, got "
            f"{[path.name for path in found] or 'none'}"
        )
    return found[0]


def _pairs(path: Path) -> list[tuple[str, str | int | float]]:
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
    if delimiter is None:
        _check_words([row[label] for row in rows], path)
    return [(row[file].strip(), row[label].strip()) for row in rows]


def _delimiter(lines: Sequence[str], kind: str) -> str | None:
    """What parts the columns; None: spaces."""
    first = lines[0] if lines else ""
    if kind == ".tsv" or "\t" in first:
        return "\t"
    if kind == ".csv":
        by_semicolon = all(";" in line for line in lines)
        by_comma = all("," in line for line in lines)
        # Commas may also stand in numbers, and in names of files.
        is_semicolon = (by_semicolon and not by_comma) or (";" in first and "," not in first)
        return ";" if is_semicolon else ","
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


def _check_words(labels: Sequence[str], path: Path) -> None:
    """DataError: each line has a number and a word, so that nobody knows which is the label."""
    if labels and all(re.match(r"[+-]?\d+\s+\S", label) for label in labels):
        raise DataError(
            f"{path} must have a file and a label in each line, got {labels[0]!r} as a label, "
            "which is a number and a name: leave one of them out, or write a .csv file with the "
            "names of its columns"
        )


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
        if name in found and found[name] != value:
            raise DataError(
                f"a table of labels must list each file with one label, got {name!r} with "
                f"{found[name]!r} and {value!r}"
            )
        found[name] = value
    return found


def _label(value: Any, path: Path) -> str | int | float:
    """A number, or a text that may be one. Of Kaggle's "n01440764 1 2 3 4 n01440764 5 6 7 8" the
    boxes are left out."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"labels in {path} must be whole numbers or names, got {value!r}")
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise DataError(f"labels in {path} must be whole numbers or names, got an empty one")

    if not re.fullmatch(r"(n\d{8}(?: \d+){4} ?)+", value):
        return value
    kinds = sorted(set(re.findall(r"n\d{8}", value)))
    if len(kinds) > 1:
        raise DataError(f"labels in {path} must be one for each file, got {' and '.join(kinds)}")
    return kinds[0]


def _numbered(
    pairs: Sequence[tuple[str, str | int | float]], path: Path
) -> tuple[list[int], list[str] | None]:
    """(numbers, names): labels are numbers if all of them are; else they are names, which get
    numbers in their alphabetical order. So do labels below 0, which are no indices: a class map
    may say what they are."""
    numbers = [_number(label) for _, label in pairs]
    if None not in numbers:
        labels = [_whole(n, file, path) for n, (file, _) in zip(numbers, pairs, strict=True)]
        if min(labels) >= 0:
            return labels, None
        return _placed(labels)

    told = [label for _, label in pairs]
    number = next((n for n in told if not isinstance(n, str) or WHOLE.fullmatch(n)), None)
    if number is not None:
        name = next(label for label, n in zip(told, numbers, strict=True) if n is None)
        raise DataError(
            f"labels in {path} must all be whole numbers or all be names, got {number} and {name!r}"
        )
    return _placed([str(label) for label in told])


def _placed(labels: Sequence[Any]) -> tuple[list[int], list[str]]:
    """(the place of each label among all, what they are called in this order)."""
    kinds = sorted(set(labels))
    place = {label: number for number, label in enumerate(kinds)}
    return [place[label] for label in labels], [str(label) for label in kinds]


def _number(label: str | int | float) -> int | float | None:
    """The number that a label is; None: it is a name."""
    if not isinstance(label, str):
        return label
    if re.fullmatch(r"[+-]?\d+", label):
        return int(label)
    return float(label) if NUMBER.fullmatch(label) else None


def _whole(number: Any, file: str, path: Path) -> int:
    """A label as an index. Programs that know floats alone write 3 as 3.0 or 3.000e+00."""
    if isinstance(number, float) and not number.is_integer():  # as NaN and infinity are
        raise DataError(
            f"labels in {path} must be whole numbers or names, got {number} of {file!r}"
        )
    if abs(number) > LARGEST_LABEL:
        raise DataError(f"labels in {path} must be within 64 bits, got {int(number)} of {file!r}")
    return int(number)
