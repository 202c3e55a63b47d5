"""What a run on a GPU has found so far: a file of JSON lines. Each finished piece has a line, which
is on disk before the next piece begins.

Several processes write to it in turn. A kill loses the piece that was under way, and ``--resume``
goes on with the rest.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ironmoe.bench.common.files import finite

# What an error says after which nothing runs in its process any more.
BROKEN_DEVICE = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
    "illegal instruction",
)
Entry = dict[str, Any]  # a line of the run log
Row = dict[str, Any]  # a line of one of TABLES
LONGEST_REASON = 300  # letters of an error that a row or a note keeps
TABLES = ("rows", "kernels", "compiled", "blocks", "attack", "checks", "tuning", "notes")


class RunLog:
    """Entries by kind:

    - run: the settings, once at the top;
    - start: ``job``, ``part`` and ``who`` have begun, which says what was under way when a process
      died;
    - part: ``job`` and ``part`` are finished; a list of rows for each of ``TABLES`` that got some;
    - end: ``job`` has an ``outcome``, a ``why`` and ``seconds``;
    - collected, test: see ``suite_log.py``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_to = 0

    def write(self, kind: str, **entry: Any) -> None:
        """Append an entry, and wait until it is on disk."""
        line = json.dumps(finite({"kind": kind, **entry})) + "\n"
        with open(self.path, "a+b") as file:
            file.write(self._needs_newline(file) + line.encode())
            file.flush()
            os.fsync(file.fileno())

    def entries(self) -> list[Entry]:
        """All entries."""
        return list(_parsed(self._whole_lines(0)))

    def news(self) -> list[Entry]:
        """The entries since the last call."""
        data = self._whole_lines(self._read_to)
        self._read_to += len(data)
        return list(_parsed(data))

    def _whole_lines(self, start: int) -> bytes:
        """The bytes after ``start``, without a last line that a kill has cut off."""
        if not self.path.is_file():
            return b""
        with open(self.path, "rb") as file:
            file.seek(start)
            data = file.read()
        return data[: data.rfind(b"\n") + 1]

    @staticmethod
    def _needs_newline(file: Any) -> bytes:
        """What separates the next line from a line that a kill has cut off."""
        if file.seek(0, os.SEEK_END) == 0:
            return b""
        file.seek(-1, os.SEEK_END)
        return b"" if file.read(1) == b"\n" else b"\n"


def _parsed(lines: bytes) -> Iterator[Entry]:
    for line in lines.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # cut off by a kill, and completed by a newline since
            continue


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"


def finished_parts(entries: list[Entry], job: str) -> list[str]:
    """The parts of a job that need not be done again."""
    return [entry["part"] for entry in entries if entry["kind"] == "part" and entry["job"] == job]


def outcomes(entries: list[Entry]) -> dict[str, Entry]:
    """For every job that has ended, the entry of its last end."""
    return {entry["job"]: entry for entry in entries if entry["kind"] == "end"}


def under_way(entries: list[Entry], job: str) -> tuple[str, str]:
    """(part, who) that a job has begun last; empty if it has begun nothing."""
    started = [entry for entry in entries if entry["kind"] == "start" and entry["job"] == job]
    return (started[-1]["part"], started[-1]["who"]) if started else ("", "")


def tables(entries: list[Entry]) -> dict[str, list[dict[str, Any]]]:
    """The rows of all parts, by the names of TABLES."""
    parts = [entry for entry in entries if entry["kind"] == "part"]
    return {name: [row for part in parts for row in part.get(name, ())] for name in TABLES}


class Pen:
    """Writes the entries of one job. ``done``: the parts that the job has finished, in earlier
    processes too."""

    def __init__(self, run_log: RunLog, job: str) -> None:
        self.run_log, self.job = run_log, job
        self.done = set(finished_parts(run_log.entries(), job))

    def begin(self, part: str, who: str = "") -> None:
        """Note what begins now: if the process dies before the next note, it died of this."""
        self.run_log.write("start", job=self.job, part=part, who=who)

    def finish(self, part: str, **rows: list[dict[str, Any]]) -> None:
        """Note that a part is finished. ``rows``: lists for ``TABLES``."""
        self.run_log.write(
            "part",
            job=self.job,
            part=part,
            **{table: found for table, found in rows.items() if found},
        )
        self.done.add(part)


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, so that nobody else
    writes to a run log that is resumed. Linux only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
