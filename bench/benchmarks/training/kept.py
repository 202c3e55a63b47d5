"""What was measured is kept in a folder, one file for each piece of work, so that an interrupted
command loses at most the piece under way, and several processes may share the folder."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ironmoe.attacks.evaluation.describe import differences
from ironmoe.bench.common.files import finite, write_json
from ironmoe.bench.common.machine.hardware import describe_device, processor
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.user_error import UserError


class Kept:
    """The files of one part of the benchmark.

    Each file says with which settings, on which machine and by which command its rows came about.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.settings = finite(json.loads(json.dumps(settings)))

    def read(self, name: str) -> dict[str, Any] | None:
        """The content of a file; None if this piece of work is still to be done.

        Raises:
            UserError: it was done with other settings.
        """
        file = self.folder / f"{name}.json"
        found = _content(file)
        if found is not None:
            self._check(file, found["settings"])
        return found

    def begin(self, name: str) -> None:
        """Note with which settings a piece of work is begun, before it leaves weights or a state.

        Raises:
            UserError: it was begun with other settings.
        """
        file = self.folder / f"{name}.begun"
        found = _content(file)
        if found is None:
            write_json(file, self.settings)
        else:
            self._check(file, found)

    def _check(self, file: Path, settings: dict[str, Any]) -> None:
        """UserError: the settings in the file are not those of now."""
        if other := differences(settings, self.settings):
            raise UserError(
                f"{file} was measured with other settings ({', '.join(other)}); choose another "
                "--folder"
            )

    def write(self, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Keep the rows of a finished piece of work. Returns the content of the file."""
        content = {
            "settings": self.settings,
            "versions": versions(),
            "processor": processor(),
            "device": describe_device(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "command": " ".join(["ironmoe", *sys.argv[1:]]),
            "rows": rows,
        }
        write_json(self.folder / f"{name}.json", content)
        (self.folder / f"{name}.begun").unlink(missing_ok=True)
        return content

    def all(self) -> list[dict[str, Any]]:
        """The content of every file, by name, whichever process wrote it."""
        names = sorted(file.stem for file in self.folder.glob("*.json"))
        return [found for name in names if (found := self.read(name)) is not None]


def _content(file: Path) -> dict[str, Any] | None:
    """None: there is no such file, or a kill left a part of it."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found
