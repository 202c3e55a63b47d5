"""cp.async: copies from global to shared memory that a thread waits for in groups, which it numbers
itself.
"""

from dataclasses import dataclass

import numpy as np

from ptx.memory import Memory
from ptx.numbers import Array, i64, u8
from ptx.reports import Reports
from ptx.shared_memory import SharedMemory


@dataclass
class Copy:
    """One copy of each of some threads. groups: how many groups each had committed before."""

    threads: Array
    places: Array
    values: Array
    groups: Array


class AsyncCopies:
    """The copies of a batch that are in flight, and how many groups each thread has committed."""

    def __init__(
        self, memory: Memory, shared: SharedMemory, threads: int, reports: Reports
    ) -> None:
        self.memory, self.shared, self.reports = memory, shared, reports
        self.in_flight: list[Copy] = []
        self.committed = np.zeros(threads, i64)

    def start(
        self,
        target: Array,
        source: Array,
        width: int,
        size: Array,
        mask: Array,
        programs: Array,
        where: str,
    ) -> None:
        """``width`` bytes to shared memory, of which ``size`` are read and the others are 0."""
        size = np.broadcast_to(size, mask.shape)
        if (mask & (size != 0) & (size != width)).any():
            self.reports.add(f"a copy of part of its {width} bytes at {where}")
        read = mask & (size > 0)
        values = np.zeros((len(mask), width), u8)
        values[read] = self.memory.load(source, width, read, programs, where)[read]

        threads, places = self.shared.places(target, width, mask, where)
        self.shared.begin_copy(places, width, self.shared.tags[threads], where)
        self.in_flight.append(Copy(threads, places, values[threads], self.committed[threads]))

    def commit(self, mask: Array) -> None:
        """What the threads in ``mask`` started so far is a group."""
        self.committed += mask

    def wait(self, allowed: int, mask: Array) -> None:
        """Until at most ``allowed`` of a thread's groups are in flight."""
        left = []
        for copy in self.in_flight:
            done = mask[copy.threads] & (copy.groups < self.committed[copy.threads] - allowed)
            if done.any():
                places, width = copy.places[done], copy.values.shape[1]
                self.shared.end_copy(places, width, copy.values[done])
                self.shared.mark_writer(places, width, self.shared.tags[copy.threads[done]])
            if not done.all():
                copy.threads, copy.places = copy.threads[~done], copy.places[~done]
                copy.values, copy.groups = copy.values[~done], copy.groups[~done]
                left.append(copy)
        self.in_flight = left
