"""The journal of several processes that do the same: one of them reads and writes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ironmoe.attacks.engine.records import Record, Records
from ironmoe.attacks.evaluation.journal import Journal
from ironmoe.attacks.evaluation.sharding import Shard


class FollowedJournal(Journal):
    """A journal that another process writes: it knows the same and touches no file, but to read
    final images."""

    def __init__(self, folder: Path, records: Records, checksums: dict[int, int]) -> None:
        self.folder = folder
        self.records = records
        self.checksums = checksums

    def append(
        self, records: Sequence[Record], checksums: Sequence[int], images: Sequence[Tensor | None]
    ) -> None:
        for record in records:
            self.records.add(record)

    def close(self) -> None:
        pass


def open_journal(folder: Path, settings: dict[str, Any], shard: Shard) -> Journal:
    """The journal of this replica, with the same records on each of its processes.

    Raises:
        JournalError: as ``Journal``, on each of them.
    """
    written: list[Journal] = []

    def read() -> tuple[Records, dict[int, int]]:
        written.append(Journal(folder, settings, shard.rank))
        return written[0].records, written[0].checksums

    records, checksums = shard.first(read)
    return written[0] if written else FollowedJournal(folder, records, checksums)
