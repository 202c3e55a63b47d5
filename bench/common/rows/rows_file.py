"""A file of measured rows. It is written anew after each row, so that whatever ends a command loses
at most the row under way, and the same command goes on."""

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from ironmoe.bench.common.files import finite, write_json
from ironmoe.bench.common.machine.origin import origin
from ironmoe.bench.common.machine.provenance import command_line, provenance
from ironmoe.bench.common.rows.found import beside, differing, found_rows, sound_rows
from ironmoe.bench.common.run_folder import OutputError, default_folder

Row = dict[str, Any]
Key = Mapping[str, Any]
NAME = "rows.json"


class RowsFile:
    """The rows of one benchmark, under one choice of settings, on one machine and one version.

    The file is a dict in JSON. "benchmark": the command; "settings"; "made": see ``provenance``, of
    the first command that wrote the file, with "code", see ``code_digest``; "sessions": a dict with
    "date" and "command" for each command that wrote it; "rows": each with "measured", the date and
    time in UTC (ISO 8601).

    path: of the file; rows: in the order in which they were first measured; damaged: how many there
    were that count as missing.
    """

    def __init__(self, path: Path, benchmark: str, settings: Mapping[str, Any]) -> None:
        """Nothing is read or written yet: see ``rows_file``."""
        self.path = path
        self.benchmark = benchmark
        self.settings = _plain(settings)
        self.made = provenance()
        self.sessions: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        self.damaged = 0
        self.asked: list[Key] = []
        self._is_finished: Callable[[Row], bool] = lambda row: True
        self._is_whole: Callable[[Row], bool] = lambda row: True
        self._lock: IO[bytes] | None = None

    @property
    def missing(self) -> list[Key]:
        """The keys that are asked for and not measured to the end."""
        found = ((key, self.find(key)) for key in self.asked)
        return [key for key, row in found if row is None or not self._is_finished(row)]

    @property
    def greeting(self) -> str:
        """The line that a command prints when it begins."""
        there, asked = len(self.asked) - len(self.missing), len(self.asked)
        if there == asked:
            return (
                f"All {asked} rows are in {self.path}; --again measures them anew.{self._damage()}"
            )
        if self.rows or self.damaged:
            return f"Going on in {self.path}: {there} of {asked} rows are there.{self._damage()}"
        return f"Writing each row to {self.path}.{self._elsewhere()}"

    def _damage(self) -> str:
        """A sentence on rows that cannot be what was measured."""
        if not self.damaged:
            return ""
        rows = "1 row was damaged" if self.damaged == 1 else f"{self.damaged} rows were damaged"
        done = "measured anew" if self.missing else "left out, as this command does not ask for it"
        return f" {rows}: {done}."

    def _elsewhere(self) -> str:
        """A sentence on the newest rows of the same settings in a folder beside this one."""
        for path, content in beside(self.path, self.benchmark):
            if content["rows"] and content["settings"] == self.settings:
                how = ", ".join(differing(content, self.settings, self.made))
                return f" Rows in {path} were measured otherwise ({how})."
        return ""

    def find(self, key: Key) -> Row | None:
        """The row that has the entries of ``key``; None if it is still to be measured."""
        wanted = _plain(key).items()
        return next((row for row in self.rows if wanted <= row.items()), None)

    def put(self, key: Key, row: Mapping[str, Any]) -> Row:
        """Keep a row, in place of the one of this key if there is one, and write the file.

        Returns:
            The row as the file has it.
        """
        new: Row = _plain({**key, **row, "measured": _now()})
        old = self.find(key)
        if old is None:
            self.rows.append(new)
        else:
            self.rows[self.rows.index(old)] = new
        self._write()
        return new

    def begin(
        self,
        asked: Iterable[Key],
        again: bool,
        is_finished: Callable[[Row], bool],
        is_whole: Callable[[Row], bool],
    ) -> None:
        """Take over what the file holds, note this command, and write.

        Raises:
            OutputError: see ``rows_file``.
        """
        self.asked, self._is_finished, self._is_whole = list(asked), is_finished, is_whole
        found = found_rows(self.path, self.benchmark)
        if found is not None:
            self._hold()
            self._take(found, again)
        self.sessions.append({"date": _now(), "command": command_line()})
        try:
            self._write()
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror or error}; choose another file "
                "with --out"
            ) from error

    def end(self) -> None:
        """Let other commands write the file."""
        if self._lock is not None:
            self._lock.close()

    def _take(self, found: dict[str, Any], again: bool) -> None:
        differ = differing(found, self.settings, self.made)
        if differ and not again:
            raise OutputError(
                f"{self.path} has rows that were measured otherwise ({', '.join(differ)}), and one "
                "file does not mix them; choose another with --out, or replace them with --again"
            )
        if differ:
            return

        names = list(self.asked[0]) if self.asked else []
        self.rows = sound_rows(found["rows"], names, self._is_whole)
        self.damaged = len(found["rows"]) - len(self.rows)
        if again and not self.missing:
            self.rows = []
        else:
            self.made, self.sessions = found["made"], found["sessions"]

    def _write(self) -> None:
        names = ("benchmark", "settings", "made", "sessions", "rows")
        write_json(self.path, {name: getattr(self, name) for name in names})
        self._hold()

    def _hold(self) -> None:
        """Lock the file against other commands. Each writing has made a new file."""
        file = self.path.open("rb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise OutputError(
                f"{self.path} is in use by another command; wait for its end, or choose another "
                "file with --out"
            ) from None
        self.end()
        self._lock = file


@contextmanager
def rows_file(
    benchmark: str,
    settings: Mapping[str, Any],
    *,
    out: Path | None = None,
    asked: Iterable[Key] = (),
    again: bool = False,
    is_finished: Callable[[Row], bool] = lambda row: True,
    is_whole: Callable[[Row], bool] = lambda row: True,
) -> Iterator[RowsFile]:
    """The rows that are there already, and the file for those to come, which no other command may
    write meanwhile. It is written at once: a place that cannot be written is found before anything
    is measured.

    Args:
        benchmark: the command, such as "bench cpu".
        settings: what must be the same for rows to stand in one file.
        out: the file. By default runs/<benchmark>-<digest>/rows.json, where settings, machine and
            versions make the digest: what was measured elsewhere lies in another folder.
        asked: the keys of the rows that the command wants.
        again: forget what was measured if all of ``asked`` was, or if it was measured otherwise.
            So a command with ``again`` that was interrupted goes on, too.
        is_finished: whether a row that is there needs no more work.
        is_whole: whether a row that is there has the figures of its benchmark, and possible ones.
            Another one was changed by somebody, and is measured again; see ``sound_rows``.

    Raises:
        OutputError: the file cannot be written, holds something else, or has rows of other
            settings, of another machine or of another version.
    """
    file = RowsFile(_default_file(benchmark, settings) if out is None else out, benchmark, settings)
    try:
        file.begin(asked, again, is_finished, is_whole)
        yield file
    finally:
        file.end()


def _default_file(benchmark: str, settings: Mapping[str, Any]) -> Path:
    of = {"settings": _plain(settings), "origin": origin(provenance())}
    folder = default_folder(benchmark.replace(" ", "-"), of)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made: {error.strerror or error}; choose a file with --out"
        ) from error
    return folder / NAME


def _plain(content: Mapping[str, Any]) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(finite(dict(content))))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
