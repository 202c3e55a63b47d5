"""The folder of a checkpoint that several processes write: whole, or as it was before.

The folder holds ``ironmoe.json`` and the subfolder of data that it names. A new checkpoint is
written into a new subfolder. Then ``ironmoe.json`` is replaced in one step, and only then are the
former data removed. So a process that is killed at any time leaves the former checkpoint or the new
one. What a killed save has left is removed by the next.

The file has the size and the checksum of each file of data, because readers of tensors do not
notice a changed bit.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ironmoe.moe.checkpoints.errors import CheckpointError, reading, require

FORMAT = "ironmoe.checkpoint/1"
DESCRIPTION = "ironmoe.json"
_DATA = re.compile(r"ironmoe-data-(\d+)")
_BLOCK = 1 << 22  # bytes that are read at a time

# Of a file: (its size in bytes, the CRC-32 of its content).
Checksum = tuple[int, int]


def begin(folder: Path) -> Path:
    """A new subfolder for data, in a folder that is made if need be. The subfolders of saves that
    did not finish are removed; the checkpoint that is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    former = dict(_data_folders(folder))
    for data in former.values():
        if not _may_be_needed(data):
            shutil.rmtree(data, ignore_errors=True)

    data = folder / f"ironmoe-data-{max(former, default=0) + 1}"
    data.mkdir()
    return data


def finish(data: Path, files: Mapping[str, Checksum], content: Mapping[str, Any]) -> None:
    """Make the data the checkpoint of their folder, and remove the former data.

    Args:
        data: from ``begin``.
        files: every file in it, of all processes.
        content: what else the description has; JSON must be able to hold it.

    CheckpointError: a file is not there.
    """
    folder = data.parent
    for name, (size, _) in files.items():
        part = data / name
        is_seen = part.is_file() and part.stat().st_size == size
        words = f"{size} bytes, on a file system that all processes see"
        require(is_seen, part, "none or another file", words)

    described = {"format": FORMAT, **content, "data": data.name, "files": dict(files)}
    description = json.loads(json.dumps(described))  # as it will be read
    text = json.dumps(description | {"checksum": _checksum_of(description)}, indent=1)

    partial = folder / f"{DESCRIPTION}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync_names(data)
    _sync_names(folder)
    partial.replace(folder / DESCRIPTION)
    _sync_names(folder)

    for _, former in _data_folders(folder):
        if former != data:
            shutil.rmtree(former, ignore_errors=True)


def describe(folder: Path) -> dict[str, Any]:
    """What ``finish`` wrote.

    CheckpointError: there is no checkpoint, none that has finished, one of another format, or a
    damaged one.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        unfinished = [data.name for _, data in _data_folders(folder)]
        has = f"{unfinished[0]} of a save that did not finish" if unfinished else "no such file"
        raise CheckpointError(f"{file}: found {has}, expected a file of save_checkpoint")

    with reading(file, "JSON"):
        description = json.loads(file.read_bytes())
    require(isinstance(description, dict), file, description, "the description of a checkpoint")
    found = description.get("format")
    require(found == FORMAT, file, found, f"format {FORMAT}")
    checksum = description.pop("checksum", None)
    expected = _checksum_of(description)
    require(checksum == expected, file, f"checksum {checksum}", f"{expected}, as its content has")
    return description


def require_whole(data: Path, name: str, expected: Checksum) -> None:
    """CheckpointError unless the file has its size and its checksum."""
    file, size = data / name, expected[0]
    with reading(file, "a file"):
        require(file.is_file(), file, "no such file", f"a file of {size} bytes")
        found = file.stat().st_size
        require(found == size, file, f"{found} bytes", f"{size}")
        checksum = checksum_of_file(file)
    require(checksum == tuple(expected), file, f"checksum {checksum[1]}", f"{expected[1]}")


def checksum_of_file(file: Path) -> Checksum:
    """The size and the CRC-32 of a file."""
    size, checksum = 0, 0
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def _checksum_of(description: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(description, sort_keys=True).encode())


def _data_folders(folder: Path) -> Iterator[tuple[int, Path]]:
    """Subfolders of data with their numbers; nothing else in the folder is touched."""
    if folder.is_dir():
        for entry in sorted(folder.iterdir()):
            if (match := _DATA.fullmatch(entry.name)) and entry.is_dir():
                yield int(match[1]), entry


def _may_be_needed(data: Path) -> bool:
    """Whether the description names the data, or cannot say whether it does."""
    try:
        return json.loads((data.parent / DESCRIPTION).read_bytes())["data"] == data.name
    except FileNotFoundError:
        return False
    except (ValueError, LookupError, TypeError):  # damaged, or of another format
        return True


def _sync_names(folder: Path) -> None:
    """Names reach the disk before what follows, so that a power cut keeps the order, too."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
