"""The journal of an evaluation: one line for what was found out, appended at once, so that a kill loses nothing that was known."""

import hashlib
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.records import Record, Records

SYNC_SECONDS = 5.0


class JournalError(ValueError):
    """A journal of something else, or one that cannot be read."""


class Journal:
    """A folder with ``journal-RANK.jsonl`` of each process, and ``images-RANK.bin`` if final images are kept.

    The first line says what is evaluated; each further line is a record. A line is complete or, cut off by a kill, ignored. Records
    of other processes are read, too, so that a run may go on with another number of them.

    Args:
        folder: made if it is not there.
        settings: what must be the same to go on: attacks, radii, weights. JSON values.
        rank: of this process.

    Raises:
        JournalError: the folder holds a journal with other settings; the message names the first difference.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.records, self._synced = folder, Records(), time.monotonic()
        self.checksums: dict[int, int] = {}
        settings = json.loads(json.dumps(settings))
        self.rank, own = rank, folder / f"journal-{rank}.jsonl"
        for path in sorted(folder.glob("journal-*.jsonl")):
            self._read(path, settings, mine=path == own)
        self._file = own.open("ab")
        self._images = (folder / f"images-{rank}.bin").open("ab")
        if self._file.tell() == 0:
            self._write({"settings": settings})

    def append(self, record: Record, checksum: int, image: Tensor | None) -> None:
        """Note a record, its final image first."""
        if image is not None:
            record = record._replace(offset=self._images.tell(), rank=self.rank)
            self._images.write(image.detach().cpu().contiguous().numpy().tobytes())
            self._images.flush()
        self._write(record._asdict() | {"checksum": checksum})
        self.records.add(record)

    def check(self, index: int, checksum: int) -> None:
        """JournalError if this image is not the one that was evaluated under this index."""
        if self.checksums.get(index, checksum) != checksum:
            raise JournalError(f"data must be what the journal in {self.folder} is about, got another image {index}")

    def image(self, record: Record, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """The final image of a record."""
        if record.offset < 0:
            return None
        with (self.folder / f"images-{record.rank}.bin").open("rb") as file:
            file.seek(record.offset)
            data = bytearray(file.read(shape.numel() * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def close(self) -> None:
        for file in (self._images, self._file):
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _read(self, path: Path, settings: dict[str, Any], mine: bool) -> None:
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if mine and len(complete) < len(data):  # cut off by a kill; another process may be writing its own
            with path.open("r+b") as file:
                file.truncate(len(complete))
        lines = complete.splitlines()
        if not lines:
            return
        try:
            head, *rest = (json.loads(line) for line in lines)
            found = head["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"{path} must be a journal of this program, got {error}") from error
        for name in settings.keys() | found.keys():
            if settings.get(name) != found.get(name):
                raise JournalError(
                    f"{name} must be as in the journal {path} to go on, {found.get(name)!r}, got {settings.get(name)!r}; "
                    "use another folder for another evaluation"
                )
        for line in rest:
            checksum = line.pop("checksum")
            record = Record(**line)
            self.records.add(record)
            self.checksums[record.example] = checksum


def checksum(image: Tensor) -> int:
    """Of an image's values."""
    return zlib.crc32(image.detach().cpu().contiguous().numpy().tobytes())


def weights_digest(model: Any) -> str:
    """SHA-256 of a module's weights and buffers: a run goes on only with the very same model. "" of another callable."""
    if not isinstance(model, torch.nn.Module):
        return ""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
