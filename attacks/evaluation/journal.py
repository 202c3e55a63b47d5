"""The journal of an evaluation: one line for what was found out, appended at once, so that a kill
loses nothing that was known."""

import fcntl
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.engine.records import Record, Records, record_from
from ironmoe.attacks.evaluation.old_journals import translated

SYNC_SECONDS = 5.0
FORMAT = 2  # of the first line; journals before it have no number


class JournalError(ValueError):
    """A journal of something else, one that is in use, or one that cannot be read."""


class Journal:
    """A folder with ``journal-RANK.jsonl`` of each process, and ``images-RANK.bin`` if final images
    are kept.

    The first line says what is evaluated; each further line holds the records of images that were
    attacked together. A line is complete or, cut off by a kill, ignored; so is one whose images did
    not reach the disk. Records of other processes are read, too, so that a run may go on with
    another number of them.

    Args:
        folder: made if it is not there.
        settings: what must be the same to go on: attacks, radii, weights. JSON values.
        rank: of this process.

    Raises:
        JournalError: the folder holds a journal with other settings (the message names the first
            difference), or another process writes to it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.rank = rank
        self.records = Records()
        self.checksums: dict[int, int] = {}
        settings = json.loads(json.dumps(settings))

        own = folder / f"journal-{rank}.jsonl"
        self._file = own.open("ab")
        self._images = (folder / f"images-{rank}.bin").open("ab")
        self._synced = time.monotonic()
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise JournalError(
                    f"{own} must not be in use, got one that another evaluation writes to"
                ) from None
            for path in sorted(folder.glob("journal-*.jsonl")):
                self._read(path, settings, mine=path == own)
        except JournalError:
            self._file.close()
            self._images.close()
            raise

        self._file.seek(0, os.SEEK_END)
        if self._file.tell() == 0:
            self._write({"format": FORMAT, "settings": settings})

    def append(
        self, records: Sequence[Record], checksums: Sequence[int], images: Sequence[Tensor | None]
    ) -> None:
        """Note the records of a unit, the final images first of those that have one by now."""
        lines = []
        for record, crc, image in zip(records, checksums, images, strict=True):
            if image is not None:
                start = self._images.tell()
                self._images.write(image.detach().cpu().contiguous().numpy().tobytes())
                record = record._replace(offset=start, end=self._images.tell(), rank=self.rank)
            self.records.add(record)
            lines.append(record.flat() | {"checksum": crc})
        self._images.flush()
        self._write(lines)

    def check(self, index: int, checksum: int) -> None:
        """JournalError if this image, or its label, is not the one that was evaluated under this
        index."""
        if self.checksums.get(index, checksum) != checksum:
            raise JournalError(
                f"data must be what the journal in {self.folder} is about, got another image or "
                f"label {index}"
            )

    def image(self, record: Record, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """The final image of a record."""
        if record.offset < 0:
            return None
        with (self.folder / f"images-{record.rank}.bin").open("rb") as file:
            file.seek(record.offset)
            data = bytearray(file.read(record.end - record.offset))
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def close(self) -> None:
        for file in (self._images, self._file):
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._images.fileno())  # before the lines that speak of them
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _read(self, path: Path, settings: dict[str, Any], mine: bool) -> None:
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        # cut off by a kill; another process may be writing its own
        if mine and len(complete) < len(data):
            os.truncate(path, len(complete))
        lines = complete.splitlines()
        if not lines:
            return
        images = path.with_name(path.name.replace("journal", "images").replace("jsonl", "bin"))
        there = images.stat().st_size if images.exists() else 0
        try:
            head, *rest = (json.loads(line) for line in lines)
            if not all(isinstance(unit, list) for unit in rest):
                raise TypeError("a line that is no list of records")
            found = _settings_of(head)
            units = [[(line.pop("checksum"), record_from(line)) for line in unit] for unit in rest]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(
                f"{path} must be a journal of this program, got {error!r}"
            ) from error
        for name in dict.fromkeys([*settings, *found]):
            if settings.get(name) != found.get(name):
                raise JournalError(
                    f"{name} must be as in the journal {path} to go on, {found.get(name)!r}, got "
                    f"{settings.get(name)!r}; "
                    "use another folder for another evaluation"
                )
        for unit in units:
            if all(record.end <= there for _, record in unit):
                for crc, record in unit:
                    self.records.add(record)
                    self.checksums[record.example] = crc


def _settings_of(head: dict[str, Any]) -> dict[str, Any]:
    """The settings in the first line of a journal, as today's code writes them."""
    number = head.get("format", 1)
    if number == 1:
        return translated(head["settings"])
    if number != FORMAT:
        raise ValueError(f"format {number!r}, where this program knows 1 to {FORMAT}")
    return dict(head["settings"])
