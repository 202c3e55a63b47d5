"""The folder of a run: checked before work starts, written so that an interruption loses nothing
that was finished."""

import json
import os
import shutil
from pathlib import Path
from typing import Any


class OutputError(Exception):
    """The output folder cannot be used; the message says why and what to do."""


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write beside the target, then rename: the file is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    data = content.encode() if isinstance(content, str) else content
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class RunFolder:
    """``path`` with a ``settings.json`` that says what the run is. Opening it again with other
    settings is an error."""

    def __init__(self, path: Path, settings: dict[str, Any], needed_bytes: int) -> None:
        """Make or reopen the folder. OutputError, before any work, if it cannot be written, is too
        full, or is another run's."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / "probe.partial"
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
            free = shutil.disk_usage(path).free
        except OSError as error:
            raise OutputError(
                f"output folder {path} cannot be written: {error.strerror or error}; choose "
                "another with --out"
            ) from error
        if free < needed_bytes:
            raise OutputError(
                f"output folder {path} needs {needed_bytes / 1e6:.0f} MB, but only "
                f"{free / 1e6:.0f} MB are free"
            )
        found = self.read("settings.json")
        self.resumed = found is not None
        if found is None:
            if any(path.iterdir()):
                raise OutputError(
                    f"output folder {path} holds other files and no run; choose an empty or new "
                    "one with --out"
                )
            self.write("settings.json", settings)
        elif differing := differences(found, json.loads(json.dumps(settings))):
            raise OutputError(
                f"output folder {path} holds a run with other settings ({', '.join(differing)}); "
                "choose another with --out"
            )

    def file(self, name: str) -> Path:
        """A path in the folder, its parent made."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, content: Any) -> None:
        """JSON, atomically."""
        write_atomically(self.file(name), json.dumps(content, indent=1))

    def read(self, name: str) -> Any | None:
        """JSON, or None if the file is not there (or not readable: then it is made again)."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return None


def differences(there: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, down to the entry that does: "attacks.steps: 40 there,
    20 now"."""
    if isinstance(there, dict) and isinstance(now, dict):
        inner = f"{name}." if name else ""
        return [
            line
            for key in sorted({*there, *now})
            for line in differences(there.get(key), now.get(key), f"{inner}{key}")
        ]
    return [] if there == now else [f"{name}: {there!r} there, {now!r} now"]
