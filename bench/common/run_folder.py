"""The folder of a run. It is checked before work starts, and an interruption loses nothing that was
finished."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ironmoe.bench.common.files import write_json
from ironmoe.bench.common.machine.provenance import provenance
from ironmoe.bench.common.machine.sessions import changes
from ironmoe.bench.common.user_error import UserError

# What a run writes beside the final images: checkpoints, the optimiser's state, pictures. A run of
# one seed takes about 10 MB.
NEEDED_BYTES = 100_000_000
SESSIONS = "results/sessions.json"


class OutputError(UserError):
    """The output folder cannot be used; the message says why and what to do."""


def default_folder(kind: str, settings: dict[str, Any]) -> Path:
    """runs/<kind>-<digest of the settings>. So the same command finds its own folder again, and
    another command never meets it."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{kind}-{digest}"


class RunFolder:
    """A folder with a ``settings.json`` that says what the run is.

    resumed: whether it was there before. To open it again with other settings is an error.

    ``results/sessions.json`` has the ``provenance`` of each call that measured something, and its
    ``parallel`` where the command has it.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        needed_bytes: int,
        *,
        parallel: Mapping[str, int] | None = None,
    ) -> None:
        """Make the folder, or open it again.

        parallel: how many processes do this call's work, such as {"processes": 4,
            "expert_parallel": 2}. They are no settings: any number may go on.

        Raises:
            OutputError: it cannot be written, its disk has fewer than ``needed_bytes`` left, or it
                holds other files or another run.
        """
        self.path = path
        self.parallel = None if parallel is None else dict(parallel)
        self.noted = False
        is_new = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            _try_to_write(path / f"probe.{os.getpid()}.partial")
            free = shutil.disk_usage(path).free
        except OSError as error:
            raise OutputError(
                f"output folder {path} cannot be written: {error.strerror or error}; choose "
                "another with --out"
            ) from error

        if free < needed_bytes:
            if is_new:
                path.rmdir()
            raise OutputError(
                f"output folder {path} needs {needed_bytes / 1e6:.0f} MB, but only "
                f"{free / 1e6:.0f} MB are free"
            )

        # A kill while the settings were written leaves a part of them.
        others = any(not file.name.endswith(".partial") for file in path.iterdir())
        found = self.read("settings.json")  # after that look: another process may write them now
        self.resumed = found is not None
        if found is None:
            if others:
                raise OutputError(
                    f"output folder {path} holds other files and no run; choose an empty or new "
                    "one with --out"
                )
            self.write("settings.json", settings)
        elif differing := _differences(found, json.loads(json.dumps(settings))):
            raise OutputError(
                f"output folder {path} holds a run with other settings ({', '.join(differing)}); "
                "choose another with --out"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block no other process that asks for the folder gets it.

        OutputError: another one has it.
        """
        with (self.path / "settings.json").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputError(
                    f"output folder {self.path} is in use by another run; wait for its end, or "
                    "choose another with --out"
                ) from None
            yield

    def worked(self) -> None:
        """Note that this call measures something, and where and with what it does."""
        if not self.noted:
            of_call = provenance()
            if self.parallel is not None:
                of_call["parallel"] = self.parallel
            self.write(SESSIONS, [*sessions_of(self.path), of_call])
            self.noted = True

    @property
    def greeting(self) -> str:
        """The lines that a command prints when it begins."""
        if not self.resumed:
            return f"Writing to {self.path}/"
        differing = []
        for before in sessions_of(self.path)[-1:]:
            differing = changes(before, provenance())
            if self.parallel is not None and "parallel" in before:
                differing += _differences(before["parallel"], self.parallel)
        note = f"\nWhat is there was measured with {'; '.join(differing)}." if differing else ""
        return f"Going on in {self.path}/{note}"

    @property
    def farewell(self) -> str:
        """The line that a command prints when its report is written."""
        return f"Report: {self.path}/report.html, numbers: {self.path}/report.json"

    def file(self, name: str) -> Path:
        """The path of a file in the folder. Its parent is made."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, content: Any) -> None:
        """Write JSON, whole or not at all; NaN and infinity become None."""
        write_json(self.file(name), content)

    def read(self, name: str) -> Any | None:
        """The content of a JSON file; None if it is not there, or cannot be read: then it is made
        again."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return None


def _try_to_write(probe: Path) -> None:
    """OSError: the disk is full, or the folder cannot be written. Nothing is left behind."""
    try:
        probe.write_bytes(b"\0" * 4096)
    finally:
        probe.unlink(missing_ok=True)


def sessions_of(path: Path) -> list[dict[str, Any]]:
    """The ``provenance`` of each call that measured something for the run in this folder."""
    try:
        found: list[dict[str, Any]] = json.loads((path / SESSIONS).read_text())
    except (OSError, ValueError):
        return []
    return found


def _differences(there: Any, now: Any) -> list[str]:
    # It comes with torch, which --help does without.
    from ironmoe.attacks.evaluation.describe import differences

    return differences(there, now)
