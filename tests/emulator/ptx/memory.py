"""Global memory: the storages that a launch was given, and which program wrote each of their
bytes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ptx.numbers import Array, i32, i64, u8, u64
from ptx.reports import Reports

NOBODY = -1
GARBAGE = 0xEE  # what a load gives where it reads nothing


class Storage(NamedTuple):
    """Bytes at an address. writers: the program that wrote each byte, NOBODY if none did."""

    start: int
    stop: int
    content: Array
    writers: Array
    name: str


class Memory:
    """Loads and stores of many threads at once.

    An address outside every storage is reported, not touched.
    """

    def __init__(self, reports: Reports) -> None:
        self.reports = reports
        self.storages: list[Storage] = []
        self._starts = np.empty(0, u64)

    def add(self, address: int, content: Array, name: str) -> None:
        """Make ``content`` (bytes) known at ``address``."""
        writers = np.full(content.size, NOBODY, i32)
        self.storages.append(Storage(address, address + content.size, content, writers, name))
        self.storages.sort(key=lambda storage: storage.start)
        self._starts = np.array([storage.start for storage in self.storages], u64)

    def find(self, address: int) -> Storage | None:
        """The storage that holds ``address``."""
        at = int(np.searchsorted(self._starts, u64(address), "right")) - 1
        if at < 0 or address >= self.storages[at].stop:
            return None
        return self.storages[at]

    def load(self, addresses: Array, width: int, mask: Array, programs: Array, where: str) -> Array:
        """(threads, width) bytes from ``addresses`` (u64) of the threads in ``mask``."""
        loaded = np.full((len(mask), width), GARBAGE, u8)
        for storage, threads, at in self._accesses(addresses, width, mask, "load", where):
            loaded[threads] = _cells(storage.content, width, at)
            writers = _cells(storage.writers, width, at)
            if ((writers != NOBODY) & (writers != programs[threads, None])).any():
                self.reports.add(
                    f"a program reads what another program wrote in {storage.name} at {where}"
                )

        return loaded

    def store(
        self, addresses: Array, values: Array, mask: Array, programs: Array, where: str
    ) -> None:
        """Write ``values`` (threads, width) for the threads in ``mask``."""
        width = values.shape[1]
        for storage, threads, at in self._accesses(addresses, width, mask, "store", where):
            own = programs[threads, None]
            before = _cells(storage.writers, width, at)
            _put(storage.content, width, at, values[threads])
            _put(storage.writers, width, at, np.broadcast_to(own, before.shape))

            after = _cells(storage.writers, width, at)
            if (((before != NOBODY) & (before != own)) | (after != own)).any():
                self.reports.add(f"two programs write one byte of {storage.name} at {where}")

    def _accesses(
        self, addresses: Array, width: int, mask: Array, what: str, where: str
    ) -> Iterator[tuple[Storage, Array, Array]]:
        """(storage, threads, their bytes' offsets in it) for every storage that is touched."""
        threads = np.flatnonzero(mask)
        if not len(threads):
            return
        wanted = addresses[threads]
        if (wanted & u64(width - 1)).any():
            self.reports.add(f"{what} from an address that is no multiple of {width} at {where}")

        first = self.find(int(wanted[0]))
        # Nearly always
        if first and wanted.min() >= first.start and int(wanted.max()) + width <= first.stop:
            yield first, threads, (wanted - u64(first.start)).astype(i64)
            return
        holders = np.searchsorted(self._starts, wanted, "right").astype(i64) - 1
        for holder in np.unique(holders):
            chosen = holders == holder
            storage = self.storages[holder] if holder >= 0 else None
            whole = (
                chosen & (wanted + u64(width) <= u64(storage.stop))
                if storage
                else np.zeros_like(chosen)
            )
            outside = wanted[chosen & ~whole]
            if len(outside):
                near = (
                    f", {int(outside[0]) - storage.stop} bytes from the end of {storage.name}"
                    if storage
                    else ""
                )
                self.reports.add(
                    f"{what} out of range: {width} bytes at {int(outside[0]):#x}{near}, at {where}"
                )
            if storage and whole.any():
                yield storage, threads[whole], (wanted[whole] - u64(storage.start)).astype(i64)


def _cells(array: Array, width: int, at: Array) -> Array:
    """(len(at), width) bytes at the offsets ``at``; aligned ones are taken a whole cell at a
    time."""
    if (at & (width - 1)).any():
        return array[at[:, None] + np.arange(width)]
    return array[: len(array) // width * width].reshape(-1, width)[at // width]


def _put(array: Array, width: int, at: Array, values: Array) -> None:
    if (at & (width - 1)).any():
        array[at[:, None] + np.arange(width)] = values
    else:
        array[: len(array) // width * width].reshape(-1, width)[at // width] = values
