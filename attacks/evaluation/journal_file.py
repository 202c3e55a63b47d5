"""A file of JSON lines that survives a kill: each line is appended at once, and one process alone
writes to it."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ironmoe.attacks.evaluation.describe import differences

SYNC_SECONDS = 5.0


class JournalError(ValueError):
    """A journal of something else, one that is in use, or one that cannot be read."""


class JournalFile:
    """The journal of this process, open for appending.

    JournalError: another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab")
        self._synced = time.monotonic()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise JournalError(
                f"{path} must not be in use, got one that another process writes to"
            ) from None

    def is_new(self) -> bool:
        """Whether it has no line yet."""
        self._file.seek(0, os.SEEK_END)
        return self._file.tell() == 0

    def write(self, line: Any, *, sync_before: Callable[[], None] | None = None) -> None:
        """Append a JSON value. Now and then the file is synced to the disk; ``sync_before`` syncs
        what lines speak of, so that no line on the disk speaks of what is not there."""
        with naming(self.path):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            if sync_before is not None:
                sync_before()
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Sync, and give the file up."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of writing inside the block, such as a full disk, names this path."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def complete_lines(path: Path, *, cut: bool) -> list[bytes]:
    """The lines of a journal without a last one that a kill cut off; ``cut`` takes it off the file,
    too, which must be no other process's: that may be writing the line."""
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if cut and len(complete) < len(data):
        os.truncate(path, len(complete))
    return complete.splitlines()


def check_settings(path: Path, found: dict[str, Any], now: dict[str, Any], other: str) -> None:
    """JournalError: a journal was begun with other settings; the message names the first entry that
    differs. other: what needs another folder, such as "another evaluation"."""
    for name in dict.fromkeys([*now, *found]):
        if found.get(name) != now.get(name):
            raise JournalError(
                f"{name} must be as in the journal {path} to go on, got "
                f"{', '.join(differences(found.get(name), now.get(name), name))}; use another "
                f"folder for {other}"
            )


def check_same(folder: Path, number: int, known: int, checksum: int) -> None:
    """JournalError: this image, its label or what else belongs to it is not what had this number
    when the journal was begun. known: the checksum that the journal has."""
    if known != checksum:
        raise JournalError(
            f"data must be what the journal in {folder} is about, got another image or label "
            f"{number}, or further inputs of the model that are not the same"
        )
