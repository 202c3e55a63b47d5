"""Shared memory of a batch of programs, with what is known of each cell: who touched it since the
barrier, which copies are in flight.

A cell is as many bytes as the program's narrowest access. Who touched it is a tag: the number of
the program's barriers so far,
times TAGS, plus the warp. So a barrier clears nothing: a tag below the present number's is of the
    past.
"""

import numpy as np

from ptx.numbers import Array, i16, i32, i64, u8, u32
from ptx.reports import Reports

TAGS = 64
# In the place of a warp: the matrix unit, the copy engine, more than one warp
MATRIX, ENGINE, SEVERAL = 61, 62, 63
EMPTY = 0xA5  # bytes that nobody has written


class SharedMemory:
    """``size`` bytes for each of ``programs``; threads carry the tag of their warp, and of their
    program's last barrier.

    Places are indices of pieces of ``width`` bytes, counted over all programs.
    """

    def __init__(self, size: int, programs: int, threads: int, cell: int, reports: Reports) -> None:
        self.size, self.cell, self.threads, self.reports = size, cell, threads, reports
        self.stride = -(-size // 1024) * 1024
        self.content = np.full(programs * self.stride, EMPTY, u8)
        cells = programs * self.stride // cell
        self.writer, self.reader, self.adder = (np.zeros(cells, i32) for _ in range(3))
        self.copying, self.in_use = np.zeros(cells, i16), np.zeros(cells, i16)
        self.written = np.zeros(cells, bool)

        thread = np.arange(programs * threads)
        self.base = thread // threads * self.stride
        self.tags = (TAGS + thread % threads // 32).astype(i32)

    def barrier(self, waiting: Array) -> None:
        """The threads in ``waiting``, all of their programs, have met."""
        self.tags[waiting] += TAGS

    def places(self, offsets: Array, width: int, mask: Array, where: str) -> tuple[Array, Array]:
        """(threads of ``mask`` whose ``width`` bytes are inside and aligned, their places); the
        others are reported.
        """
        threads = np.flatnonzero(mask)
        at = offsets[threads].astype(i64)
        bad = (at + width > self.size) | (at % width != 0)
        if bad.any():
            first = int(at[bad.argmax()])
            what = "is no multiple of its width" if first % width else f"is beyond {self.size}"
            self.reports.add(f"shared memory: {width} bytes at {first}, which {what}, at {where}")
            threads, at = threads[~bad], at[~bad]
        return threads, (self.base[threads] + at) // width

    def load(self, offsets: Array, width: int, mask: Array, where: str) -> Array:
        """(threads, width) bytes."""
        loaded = np.full((len(mask), width), 0xEE, u8)
        threads, places = self.places(offsets, width, mask, where)
        loaded[threads] = self.read(places, width, self.tags[threads], where)
        return loaded

    def store(self, offsets: Array, values: Array, mask: Array, where: str) -> None:
        """Write ``values`` (threads, width)."""
        width = values.shape[1]
        threads, places = self.places(offsets, width, mask, where)
        self.write(places, width, values[threads], self.tags[threads], where)

    def read(self, places: Array, width: int, tags: Array, where: str) -> Array:
        """(…, width) bytes at ``places`` (…), for the warps (or units) of ``tags``."""
        tags = tags[..., None]
        if _by_others(self._of(self.writer, width)[places], tags) or _by_others(
            self._of(self.adder, width)[places], tags
        ):
            self.reports.add(f"race: reads what another warp wrote since the barrier at {where}")
        if self._of(self.copying, width)[places].any():
            self.reports.add(f"reads a copy that nobody waited for at {where}")
        if not self._of(self.written, width)[places].all():
            self.reports.add(f"reads shared memory that nobody wrote at {where}")
        _mark(self._of(self.reader, width), places, tags)
        return self.content.reshape(-1, width)[places]

    def write(self, places: Array, width: int, values: Array, tags: Array, where: str) -> None:
        """Bytes ``values`` (n, width) at ``places`` (n).

        To write what is there already is no race.
        """
        tags, content = tags[:, None], self.content.reshape(-1, width)
        changed = (content[places] != values).reshape(len(places), -1, self.cell).any(-1)
        touched = (
            _others(self._of(kind, width)[places], tags)
            for kind in (self.writer, self.reader, self.adder)
        )
        if any((changed & other).any() for other in touched):
            self.reports.add(f"race: writes what another warp touched since the barrier at {where}")
        if self._of(self.copying, width)[places].any():
            self.reports.add(f"writes where a copy is in flight at {where}")
        if (changed & (self._of(self.in_use, width)[places] > 0)).any():
            self.reports.add(f"writes what a matrix unit or a copy still reads at {where}")

        content[places] = values
        if (content[places] != values).any():
            self.reports.add(f"two threads write different values at {where}")
        self._of(self.written, width)[places] = True
        _mark(self._of(self.writer, width), places, tags)

    def add(self, offsets: Array, values: Array, mask: Array, where: str) -> Array:
        """Atomic sums of u32 ``values``; what was there before, in the order of the threads."""
        before = np.zeros(len(mask), u32)
        threads, places = self.places(offsets, 4, mask, where)
        tags = self.tags[threads][:, None]
        if any(_by_others(self._of(kind, 4)[places], tags) for kind in (self.writer, self.reader)):
            self.reports.add(
                f"race: adds to what another warp touched since the barrier at {where}"
            )
        if not self._of(self.written, 4)[places].all():
            self.reports.add(f"adds to shared memory that nobody wrote at {where}")

        words = self.content.view(u32)
        for thread, place in zip(threads, places, strict=True):
            before[thread] = words[place]
            words[place] += values[thread]
        _mark(self._of(self.adder, 4), places, tags)
        return before

    def begin_copy(self, places: Array, width: int, tags: Array, where: str) -> None:
        """Bytes are on their way to ``places``: until they are there, nobody may look."""
        tags = tags[..., None]
        if any(
            _by_others(self._of(kind, width)[places], tags) for kind in (self.writer, self.reader)
        ):
            self.reports.add(f"race: copies over what a warp touched since the barrier at {where}")
        copying = self._of(self.copying, width)
        if copying[places].any():
            self.reports.add(f"copies where a copy is in flight at {where}")
        if self._of(self.in_use, width)[places].any():
            self.reports.add(f"copies over what a matrix unit or a copy still reads at {where}")
        copying[places] += 1
        self.content.reshape(-1, width)[places] = EMPTY

    def end_copy(self, places: Array, width: int, values: Array) -> None:
        """The bytes have come."""
        self.content.reshape(-1, width)[places] = values
        self._of(self.copying, width)[places] -= 1
        self._of(self.written, width)[places] = True

    def mark_writer(self, places: Array, width: int, tags: Array) -> None:
        """Bytes that a thread's own copy brought are its own until a barrier, as if it had stored
        them.
        """
        _mark(self._of(self.writer, width), places, tags[:, None])

    def begin_use(self, places: Array, width: int) -> None:
        """Something reads ``places`` on its own, and will be waited for."""
        self._of(self.in_use, width)[places] += 1

    def end_use(self, places: Array, width: int) -> None:
        """It was waited for."""
        self._of(self.in_use, width)[places] -= 1

    def unit_tag(self, program: int, unit: int) -> int:
        """The tag of a unit (MATRIX or ENGINE) of a program at its present barrier."""
        return int(self.tags[program * self.threads]) // TAGS * TAGS + unit

    def _of(self, kind: Array, width: int) -> Array:
        """One of the arrays of cells, in pieces of ``width`` bytes."""
        return kind.reshape(-1, width // self.cell)


def _others(touched: Array, tags: Array) -> Array:
    """Where another than ``tags`` has touched since the barrier."""
    return (touched >= tags // TAGS * TAGS) & (touched != tags)


def _by_others(touched: Array, tags: Array) -> bool:
    return bool(_others(touched, tags).any())


def _mark(kind: Array, places: Array, tags: Array) -> None:
    """Note who touches; two warps, before or at once, are SEVERAL."""
    before = kind[places]
    tags = np.broadcast_to(tags, before.shape)
    kind[places] = np.where(_others(before, tags), tags // TAGS * TAGS + SEVERAL, tags)

    after = kind[places]
    mixed = _others(after, tags)
    if mixed.any():
        after[mixed] = after[mixed] // TAGS * TAGS + SEVERAL
        kind[places] = after
