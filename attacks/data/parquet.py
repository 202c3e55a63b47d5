"""Images in parquet files, as Hugging Face and others store them, through pyarrow alone."""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ironmoe.attacks.data.columns import Columns, arrow, find_columns, numbered, picture
from ironmoe.attacks.data.errors import DataError
from ironmoe.attacks.data.image_set import Item, digest

SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{4,})-of-(?P<count>\d{4,})")
"""The name of a file of several, such as "validation-00000-of-00014"."""

SPLITS = re.compile(r"(?P<split>train|training|validation|valid|val|dev|test|testing)(?![a-z])")
ROWS = 16  # images that a process holds at once
BUFFER = 1 << 20  # bytes of a column that are read from the disk at once


class ParquetImages:
    """The images of parquet files, one after another.

    A process holds a page of a file at a time, however large its row groups are: pyarrow writes up
    to 1,024 rows into one. It goes on where it is if a later row is asked for, and begins the row
    group again for an earlier one.

    Args:
        name: of the set.
        files: in their order.
        image, label: the columns; None: they are found by their types and usual names.

    Raises:
        DataError: a file is no parquet file, or the columns are not clear.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        *,
        image: str | None = None,
        label: str | None = None,
    ) -> None:
        self.name = name
        self.files = [Path(path) for path in files]
        self.notes: list[str] = []
        self.columns: Columns | None = None
        self._image = image
        self._label = label
        self._groups: list[_Group] = []
        self._cursor: _Cursor | None = None

        told: list[Any] = []
        footers: list[tuple[str, int, str]] = []
        for path in self.files:
            with _opened(path) as file:
                told += self._look(path, file)
            footers.append((path.name, path.stat().st_size, _footer(path)))
        if self.columns is None or not told:
            raise DataError(f"{name} must hold images, got none in {len(self.files)} files")
        self.notes += [self.columns.note] if self.columns.note else []
        self.labels: Tensor
        self.names: list[str] | None
        self.labels, self.names = numbered(told, self.columns, name)
        self._starts: list[int] = [group.start for group in self._groups]
        self.fingerprint = digest([*footers, *((str(label),) for label in told)])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, number: int, channels: int) -> Item:
        group = self._groups[self._place(number)]
        cell = self._cell(group, number - group.start)
        label = int(self.labels[number])
        return picture(cell, label, channels, self.where(number), group.path.parent)

    def where(self, number: int) -> str:
        group = self._groups[self._place(number)]
        return f"row {number - group.start + group.first_row} of {group.path}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursor": None}  # an open file goes to no other process

    def _look(self, path: Path, file: Any) -> list[Any]:
        """Note the row groups of a file; returns its labels. No image is read."""
        columns = find_columns(file.schema_arrow, str(path), self._image, self._label)
        if self.columns is not None and self.columns != columns:
            raise DataError(
                f"parquet files of one set must have the same columns and classes, got "
                f"{self.columns} in {self.files[0]} and {columns} in {path}"
            )
        self.columns = columns

        first = 0
        for number in range(file.num_row_groups):
            start = self._groups[-1].end if self._groups else 0
            rows = file.metadata.row_group(number).num_rows
            self._groups += [_Group(path, number, start, start + rows, first)] * (rows > 0)
            first += rows
        return file.read(columns=[columns.label], use_threads=False).column(0).to_pylist()

    def _place(self, number: int) -> int:
        """Which row group holds the image."""
        return bisect.bisect_right(self._starts, number) - 1

    def _cell(self, group: _Group, row: int) -> Any:
        """What stands in a row of a row group."""
        cursor = self._cursor
        if cursor is None or not cursor.can_reach(group, row):
            assert self.columns is not None
            cursor = self._cursor = _Cursor(group, self.columns.image, before=cursor)
        return cursor.cell(row)


class _Group(NamedTuple):
    """A row group: its file and its number there; the images start … end − 1 of the set are its
    rows; first_row: the row of the file that it begins with."""

    path: Path
    number: int
    start: int
    end: int
    first_row: int


class _Cursor:
    """A column of a row group, read from its first row on. It belongs to the process that made
    it, and takes over the open file of the one before, if that is the same."""

    def __init__(self, group: _Group, column: str, before: _Cursor | None) -> None:
        self.group = group
        self.process = os.getpid()
        is_open = before and before.process == self.process and before.group.path == group.path
        self.file: Any = before.file if before and is_open else _opened(group.path)
        self.batches = self.file.iter_batches(
            batch_size=ROWS, row_groups=[group.number], columns=[column], use_threads=False
        )
        self.first = 0
        self.batch: Any = next(self.batches)

    def can_reach(self, group: _Group, row: int) -> bool:
        return self.process == os.getpid() and self.group == group and row >= self.first

    def cell(self, row: int) -> Any:
        while row >= self.first + len(self.batch):
            self.first += len(self.batch)
            self.batch = next(self.batches)
        return self.batch.column(0)[row - self.first].as_py()


def parquet_images(
    path: Path | str,
    *,
    image: str | None = None,
    label: str | None = None,
    split: str | None = None,
) -> ParquetImages:
    """A parquet file, or a folder of them, by their names.

    The column of images holds what image files hold, as binary or as Hugging Face's struct of bytes
    and path; that of labels whole numbers or names. Numbers get the names that Hugging Face wrote
    beside them; without these they are indices of the logits. The labels are read at once, images
    when they are asked for.

    Args:
        path: the file; or a folder with ``*.parquet``, or with ``data/*.parquet``, as Hugging Face
            lays them out.
        image, label: names of the columns. None: they are found by their types and usual names.
        split: of a folder with several, such as "validation": what the names of its files begin
            with, or the folder that they lie in.

    Raises:
        DataError: no such files or columns, more than one split or column to choose from, a file of
            a split is missing, or an image has no label.
    """
    path = Path(path)
    if path.is_file():
        if split is not None:
            raise DataError(f"split must come with a folder of parquet files, got the file {path}")
        return ParquetImages(path.stem, [path], image=image, label=label)

    files = _files(path, split)
    name = path.resolve().name
    return ParquetImages(
        name if split is None else f"{name} {split}", files, image=image, label=label
    )


def is_parquet(name: str) -> bool:
    """Whether a name ends as that of a parquet file does, in small or capital letters."""
    return name.lower().endswith(".parquet")


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files that lie in a folder, by their names; none if there is no such folder."""
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in sorted(names) if is_parquet(name)]


def _files(folder: Path, split: str | None) -> list[Path]:
    """The files of a split, all of them."""
    if not folder.is_dir():
        raise DataError(f"parquet files must exist, got {folder}")
    places = [folder, folder / "data"]
    if split is not None:
        places = [folder / split, folder / "data" / split, *places]
    inside = next((place for place in places if parquet_files(place)), None)
    if inside is None:
        raise DataError(f"{folder} must hold parquet files, got none there or in {folder / 'data'}")

    files = parquet_files(inside)
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    if split is not None and inside.name != split:
        if split not in splits:
            raise DataError(
                f"split must be one of {', '.join(filter(None, splits)) or 'none'} of {inside}, "
                f"got {split!r}"
            )
        files = splits[split]
    elif len(splits) > 1:
        raise DataError(
            f"split must say which files of {inside} are meant, {' or '.join(map(repr, splits))}, "
            "got none"
        )
    _check_complete(files)
    return files


def _split_of(file: Path) -> str:
    """What the name says about the split; "" if nothing."""
    shard = SHARD.fullmatch(file.stem)
    if shard is not None:
        return shard["split"]
    usual = SPLITS.match(file.stem)
    return "" if usual is None else usual["split"]


def _check_complete(files: Sequence[Path]) -> None:
    """DataError: of "…-00000-of-00014" not all 14 are there, as after half a download."""
    shards = [shard for shard in (SHARD.fullmatch(file.stem) for file in files) if shard]
    for count in sorted({int(shard["count"]) for shard in shards}):
        numbers = {int(shard["number"]) for shard in shards if int(shard["count"]) == count}
        missing = sorted(set(range(count)) - numbers)
        if missing:
            raise DataError(
                f"{files[0].parent} must hold all {count} files of {shards[0]['split']!r}, got "
                f"{len(numbers)}; the first that is missing has the number {missing[0]}"
            )


def _opened(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` that reads a little at a time, in this thread: threads do
    not survive the fork of worker processes."""
    arrow()
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a parquet file: {error}") from error


def _footer(path: Path) -> str:
    """SHA-256 of the end of a parquet file, which says what lies where."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        size = int.from_bytes(file.read(4), "little")
        file.seek(-8 - size, os.SEEK_END)
        return sha256(file.read(size)).hexdigest()
