"""The journal of an evaluation: one line for what was found out, appended at once, so that a kill
loses nothing that was known."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.engine.records import Record, Records, record_from
from ironmoe.attacks.evaluation.journal_file import (
    JournalError,
    JournalFile,
    check_same,
    check_settings,
    complete_lines,
    naming,
)
from ironmoe.attacks.evaluation.old_journals import translated

# The number in the first line of a journal; the first journals have none.
FORMAT = 2


class Journal:
    """A folder with ``journal-RANK.jsonl`` of each process, and ``images-RANK.bin`` if final images
    are kept.

    The first line says what is evaluated; each further line holds the records of images that were
    attacked together. A line is complete or, cut off by a kill, ignored; so is one whose images did
    not reach the disk. Records of other processes are read, too, so that a run may go on with
    another number of them.

    Args:
        folder: it is made if it is not there.
        settings: attacks, radii and weights, as JSON values; a run goes on only with the same.
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
        self._file = JournalFile(own)
        self._images = (folder / f"images-{rank}.bin").open("ab")
        try:
            for path in sorted(folder.glob("journal-*.jsonl")):
                self._read(path, settings, mine=path == own)
        except JournalError:
            self._file.close()
            self._images.close()
            raise
        if self._file.is_new():
            self._write({"format": FORMAT, "settings": settings})

    def append(
        self, records: Sequence[Record], checksums: Sequence[int], images: Sequence[Tensor | None]
    ) -> None:
        """Write the final images that there are by now, then one line with the unit's records."""
        lines = []
        for record, crc, image in zip(records, checksums, images, strict=True):
            if image is not None:
                start = self._images.tell()
                with naming(Path(self._images.name)):
                    self._images.write(image.detach().cpu().contiguous().numpy().tobytes())
                record = record._replace(offset=start, end=self._images.tell(), rank=self.rank)
            self.records.add(record)
            lines.append(record.flat() | {"checksum": crc})

        with naming(Path(self._images.name)):
            self._images.flush()
        self._write(lines)

    def check(self, index: int, checksum: int) -> None:
        """JournalError if this image, its label or what else belongs to it is not what was
        evaluated under this index."""
        check_same(self.folder, index, self.checksums.get(index, checksum), checksum)

    def image(self, record: Record, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """The final image of a record."""
        if record.offset < 0:
            return None
        with (self.folder / f"images-{record.rank}.bin").open("rb") as file:
            file.seek(record.offset)
            data = bytearray(file.read(record.end - record.offset))
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def close(self) -> None:
        self._images.flush()
        self._sync_images()
        self._images.close()
        self._file.close()

    def _write(self, line: Any) -> None:
        self._file.write(line, sync_before=self._sync_images)

    def _sync_images(self) -> None:
        os.fsync(self._images.fileno())

    def _read(self, path: Path, settings: dict[str, Any], mine: bool) -> None:
        """Take over the records of a journal that has the same settings."""
        lines = complete_lines(path, cut=mine)
        if not lines:
            return

        found, units = _parsed(path, lines)
        check_settings(path, found, settings, "another evaluation")

        # Records whose images did not reach the disk are left out.
        images = path.with_name(path.name.replace("journal", "images").replace("jsonl", "bin"))
        there = images.stat().st_size if images.exists() else 0
        for unit in units:
            if all(record.end <= there for _, record in unit):
                for crc, record in unit:
                    self.records.add(record)
                    self.checksums[record.example] = crc


def passes_of_journal(folder: Path) -> int | None:
    """How many passes a verdict rests on in the evaluation that was begun in this folder; None if
    there is none, or none that can be read. Journals of earlier code know one pass alone."""
    for path in sorted(folder.glob("journal-*.jsonl")):
        for line in complete_lines(path, cut=False)[:1]:
            try:
                return int(json.loads(line)["settings"].get("passes", 1))
            except (ValueError, KeyError, TypeError, AttributeError):
                return None
    return None


def _parsed(
    path: Path, lines: Sequence[bytes]
) -> tuple[dict[str, Any], list[list[tuple[int, Record]]]]:
    """The settings, and for each further line its (checksum, record) pairs. JournalError: the file
    is no journal."""
    try:
        head, *rest = (json.loads(line) for line in lines)
        if not all(isinstance(unit, list) for unit in rest):
            raise TypeError("a line that is no list of records")
        found = _settings_of(head)
        units = [[(line.pop("checksum"), record_from(line)) for line in unit] for unit in rest]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JournalError(f"{path} must be a journal of this program, got {error!r}") from error
    return found, units


def _settings_of(head: dict[str, Any]) -> dict[str, Any]:
    """The settings in the first line of a journal, as today's code writes them."""
    number = head.get("format", 1)
    if number == 1:
        return translated(head["settings"])
    if number != FORMAT:
        raise ValueError(f"format {number!r}, where this program knows 1 to {FORMAT}")
    return dict(head["settings"])
