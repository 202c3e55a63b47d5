"""What was measured is kept in a folder, one file for each piece of work, so that an interrupted
command loses at most the piece under way, and several processes may share the folder."""

import json
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

from ironmoe.attacks.evaluation.describe import differences
from ironmoe.bench.common.files import finite, write_json
from ironmoe.bench.common.machine.origin import origin
from ironmoe.bench.common.machine.provenance import provenance
from ironmoe.bench.common.rows.found import check_json, is_list_of_dicts, is_made
from ironmoe.bench.common.run_folder import OutputError
from ironmoe.bench.common.user_error import UserError


class Kept:
    """The files of one part of a benchmark.

    Each file is a dict in JSON: "settings", "made" (see ``provenance``) and "rows".
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        are_whole: Callable[[list[dict[str, Any]]], bool] = lambda rows: True,
    ) -> None:
        """are_whole: whether the rows of a piece of work have their figures, and possible ones.
        Others were changed by somebody, and this piece is still to be done."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.are_whole = are_whole
        self.damaged: set[str] = set()
        self.settings = finite(json.loads(json.dumps(settings)))

    def read(self, name: str) -> dict[str, Any] | None:
        """The content of a file; None if this piece of work is still to be done, perhaps because
        the file is damaged.

        Raises:
            UserError: it was done with other settings, or the file holds something else.
        """
        file = self.folder / f"{name}.json"
        found = _content(file)
        if found is None:
            return None
        if not _is_kept(found):
            raise UserError(
                f"{file} holds something else than measured rows; choose another --folder"
            )
        self._check(file, found["settings"])
        if not self.are_whole(found["rows"]):
            self.damaged.add(name)
            return None
        return dict(found)

    def damage(self, names: Iterable[Hashable]) -> list[str]:
        """A line on the files of these pieces of work that were read and cannot be what was
        measured; none if there are no such files."""
        files = ", ".join(f"{name}.json" for name in names if name in self.damaged)
        return [f"Damaged, and measured anew: {files} in {self.folder}."] if files else []

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

    def _check(self, file: Path, settings: Any) -> None:
        """UserError: the settings in the file are not those of now."""
        if other := differences(settings, self.settings):
            raise UserError(
                f"{file} was measured with other settings ({', '.join(other)}); choose another "
                "--folder"
            )

    def write(self, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Keep the rows of a finished piece of work. Returns the content of the file."""
        content = {"settings": self.settings, "made": provenance(), "rows": rows}
        write_json(self.folder / f"{name}.json", content)
        (self.folder / f"{name}.begun").unlink(missing_ok=True)
        return content

    def all(self) -> list[dict[str, Any]]:
        """The content of every file, by name, whichever process wrote it."""
        names = sorted(file.stem for file in self.folder.glob("*.json"))
        return [found for name in names if (found := self.read(name)) is not None]

    def origins(self) -> list[dict[str, Any]]:
        """The machines and versions that the rows are from, each once. Files of former versions do
        not name them all."""
        found = [origin(entry.get("made", {})) for entry in self.all()]
        return [one for number, one in enumerate(found) if one not in found[:number]]


def begin_copy(out: Path, content: dict[str, list[dict[str, Any]]]) -> None:
    """Write the file that repeats what a folder keeps, before anything is measured.

    Args:
        content: the entries of ``Kept.all``, by part.

    Raises:
        OutputError: the file cannot be written, or holds anything that would be lost.
    """
    check_json(out)
    try:
        text = out.read_text() if out.exists() else ""
        found = json.loads(text) if text.strip() else {}
    except OSError as error:
        raise OutputError(f"{out} cannot be read: {error.strerror or error}") from error
    except ValueError:
        found = None
    if not _repeats(content, found):
        raise OutputError(
            f"{out} holds something that this command would not write again; choose another file "
            "with --out"
        )
    try:
        write_json(out, content)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror or error}; choose another file with --out"
        ) from error


def _repeats(content: dict[str, list[dict[str, Any]]], found: Any) -> bool:
    """Whether everything in ``found`` is in ``content``."""
    if not isinstance(found, dict):
        return False
    return all(
        isinstance(entries, list) and all(entry in content.get(part, []) for entry in entries)
        for part, entries in found.items()
    )


def _content(file: Path) -> Any:
    """None: there is no such file, or a kill left a part of it."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _is_kept(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and isinstance(found.get("settings"), dict)
        and is_made(found.get("made", {}))
        and is_list_of_dicts(found.get("rows"))
    )
