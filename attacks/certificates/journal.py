"""The journal of certificates: one line for each image, appended at once, and now and then one for
the image under way, so that a kill loses a few seconds of votes."""

import json
import time
from pathlib import Path
from typing import Any

from ironmoe.attacks.certificates.voting import Tally, tally_from
from ironmoe.attacks.evaluation.journal_file import (
    JournalError,
    JournalFile,
    check_same,
    check_settings,
    complete_lines,
)

# After so many seconds the votes over an image under way are written, too.
PARTIAL_SECONDS = 5.0
FORMAT = 1


class Journal:
    """A folder with ``certificates-RANK.jsonl`` of each process.

    The first line says what is certified; each further one is a tally, and of two of the same image
    the one with more votes counts. A line that a kill cut off is ignored. Tallies of other
    processes are read, too, so that a run may go on with another number of them.

    Args:
        folder: it is made if it is not there.
        settings: the model, the noise and the numbers of copies, as JSON values; a run goes on only
            with the same.
        rank: of this process.

    Raises:
        JournalError: the folder holds a journal with other settings (the message names the first
            difference), or another process writes to it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.tallies: dict[int, Tally] = {}
        self._wrote = time.monotonic()

        own = folder / f"certificates-{rank}.jsonl"
        self._file = JournalFile(own)
        try:
            for path in sorted(folder.glob("certificates-*.jsonl")):
                self._read(path, json.loads(json.dumps(settings)), mine=path == own)
        except JournalError:
            self._file.close()
            raise
        if self._file.is_new():
            self._file.write({"format": FORMAT, "settings": settings})

    def tally_of(self, example: int, label: int, checksum: int) -> Tally:
        """What is known of this image, or a tally without votes. JournalError: it is not the image
        that had this number, or has another label or other further inputs."""
        known = self.tallies.get(example)
        if known is None:
            return Tally(example, label, checksum)
        check_same(self.folder, example, known.checksum, checksum)
        return known

    def append(self, tally: Tally, *, is_complete: bool) -> None:
        """Write a tally; one that is not complete only once enough time has passed."""
        is_due = time.monotonic() - self._wrote >= PARTIAL_SECONDS
        if is_complete or is_due:
            self.tallies[tally.example] = tally
            self._file.write(tally.flat())
            self._wrote = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def _read(self, path: Path, settings: dict[str, Any], mine: bool) -> None:
        """Take over the tallies of a journal that has the same settings."""
        lines = complete_lines(path, cut=mine)
        if not lines:
            return

        try:
            head, *rest = (json.loads(line) for line in lines)
            if head["format"] != FORMAT:
                raise ValueError(f"format {head['format']!r}, where this program knows {FORMAT}")
            found = dict(head["settings"])
            tallies = [tally_from(line) for line in rest]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(
                f"{path} must be a journal of certificates, got {error!r}"
            ) from error

        check_settings(path, found, settings, "other certificates")
        for tally in tallies:
            self.tallies[tally.example] = later(self.tallies.get(tally.example), tally)


def later(known: Tally | None, other: Tally) -> Tally:
    """Of two tallies of one image the one with more votes."""
    return other if known is None or other.drawn > known.drawn else known
