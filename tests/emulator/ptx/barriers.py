"""mbarriers: objects in shared memory on which a program waits until copies have brought all the
bytes that were announced.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ptx.numbers import Array
from ptx.reports import Fault, Reports
from ptx.shared_memory import SharedMemory

Bytes = tuple[Array, Array]  # places of 16 bytes each, and what comes there


@dataclass
class Barrier:
    """count: arrivals a phase; missing: those still to come; announced: bytes still to come, in
    ``phase``.
    """

    count: int
    missing: int
    announced: int = 0
    phase: int = 0
    on_the_way: list[Bytes] = field(default_factory=list)
    arrived: list[Bytes] = field(default_factory=list)

    def turn(self) -> None:
        """The phase is over as soon as nothing is missing."""
        if self.missing == 0 and self.announced == 0:
            self.phase ^= 1
            self.missing = self.count
            self.arrived += self.on_the_way
            self.on_the_way = []


class Barriers:
    """The mbarriers of a batch, by program and address."""

    def __init__(self, shared: SharedMemory, reports: Reports) -> None:
        self.shared, self.reports = shared, reports
        self.barriers: dict[tuple[int, int], Barrier] = {}

    def create(self, addresses: Array, count: int, mask: Array) -> None:
        """mbarrier.init"""
        for thread in np.flatnonzero(mask):
            self.barriers[self._key(thread, addresses)] = Barrier(count, count)

    def destroy(self, addresses: Array, mask: Array, where: str) -> None:
        """mbarrier.inval"""
        for thread in np.flatnonzero(mask):
            barrier = self.barriers.pop(self._key(thread, addresses), None)
            if barrier and (barrier.announced or barrier.on_the_way):
                self.reports.add(f"an mbarrier ends while copies are in flight at {where}")

    def arrive(self, addresses: Array, announced: Array, mask: Array, where: str) -> None:
        """mbarrier.arrive.expect_tx: a thread arrives, and says how many bytes will come."""
        announced = np.broadcast_to(announced, mask.shape)
        for thread in np.flatnonzero(mask):
            barrier = self.at(thread, addresses, where)
            barrier.announced += int(announced[thread])
            barrier.missing -= 1
            barrier.turn()

    def bring(
        self, thread: int, addresses: Array, places: Array, values: Array, where: str
    ) -> None:
        """Bytes come; they are seen by those who wait."""
        barrier = self.at(thread, addresses, where)
        barrier.announced -= values.size
        barrier.on_the_way.append((places, values))
        barrier.turn()

    def wait(self, addresses: Array, parity: Array, mask: Array, where: str) -> Array:
        """Until the phase of ``parity`` is over: everything comes at once here, so a phase that is
        not over never will be.
        """
        parity = np.broadcast_to(parity, mask.shape)
        for thread in self._one_of_each(addresses, mask):
            barrier = self.at(thread, addresses, where)
            if barrier.phase == int(parity[thread]) & 1:
                raise Fault(
                    f"waits for ever at {where}: {barrier.missing} arrivals, {barrier.announced} "
                    "bytes are missing"
                )
            for places, values in barrier.arrived:
                self.shared.end_copy(places, 16, values)
            barrier.arrived = []
        return np.ones(len(mask), bool)

    def are_quiet(self) -> bool:
        """Whether everything that was copied was waited for."""
        return not any(b.announced or b.on_the_way or b.arrived for b in self.barriers.values())

    def at(self, thread: int, addresses: Array, where: str) -> Barrier:
        """The barrier that a thread means."""
        key = self._key(thread, addresses)
        if key not in self.barriers:
            raise Fault(f"no mbarrier at {key[1]} at {where}")
        return self.barriers[key]

    def _key(self, thread: int, addresses: Array) -> tuple[int, int]:
        return int(thread) // self.shared.threads, int(
            np.broadcast_to(addresses, self.shared.tags.shape)[thread]
        )

    def _one_of_each(self, addresses: Array, mask: Array) -> Iterator[int]:
        """A thread for each barrier that threads in ``mask`` mean."""
        seen = {}
        threads = np.flatnonzero(mask)
        keys = (threads // self.shared.threads).astype(np.int64) << 32 | np.broadcast_to(
            addresses, mask.shape
        )[threads]
        for key in np.unique(keys):
            seen[key] = threads[int((keys == key).argmax())]
        yield from seen.values()
