"""TMA: boxes of tensors, copied between global and shared memory on behalf of one thread.

What lies outside of a tensor reads as 0.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ptx.barriers import Barriers
from ptx.memory import NOBODY, Memory, Storage
from ptx.numbers import Array, i64, u8
from ptx.reports import Reports
from ptx.shared_memory import ENGINE, SharedMemory

PIECE = 16  # bytes that stay together, whatever the layout
SPANS = {0: 0, 1: 1, 2: 3, 3: 7}  # swizzle mode → which bits of the row an address is mixed with


@dataclass(frozen=True)
class TensorMap:
    """A tensor as the copy engine knows it.

    Outer axes first; strides in elements of ``item`` bytes.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    item: int
    swizzle: int


@dataclass(frozen=True)
class Window:
    """The part of a box that is inside its tensor: where in the box, and where in the storage
    (bytes).
    """

    inside: tuple[slice, ...]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, array: Array) -> Array:
        """These elements of a storage's bytes, or of what is known of them: (…, bytes of an
        element).
        """
        size = array.itemsize
        return as_strided(
            array[self.offset :], self.shape, tuple(stride * size for stride in self.strides)
        )


class CopyEngine:
    """The boxes of a batch of programs.

    ``maps``: the tensors by the number that stands for their descriptor.
    """

    def __init__(
        self,
        memory: Memory,
        shared: SharedMemory,
        barriers: Barriers,
        maps: dict[int, TensorMap],
        reports: Reports,
    ) -> None:
        self.memory, self.shared, self.barriers, self.maps, self.reports = (
            memory,
            shared,
            barriers,
            maps,
            reports,
        )
        self.stores: list[tuple[int, int, Array]] = []  # thread, its group, places that are read
        self.committed = np.zeros(len(shared.tags), i64)

    def load(
        self,
        target: Array,
        descriptor: Array,
        corner: list[Array],
        barrier: Array,
        mask: Array,
        programs: Array,
        where: str,
    ) -> None:
        """cp.async.bulk.tensor from global memory, one box for each thread of ``mask``."""
        for thread in self._threads(mask, where):
            tensor, window, places = self._box(thread, descriptor, corner, target, mask, where)
            values = np.zeros((*tensor.box, tensor.item), u8)
            storage = self._storage(tensor, window, where)
            if storage:
                values[window.inside] = window.view(storage.content)
                writers = window.view(storage.writers)
                if ((writers != NOBODY) & (writers != programs[thread])).any():
                    self.reports.add(
                        f"a program reads what another program wrote in {storage.name} at {where}"
                    )

            tag = self.shared.unit_tag(thread // self.shared.threads, ENGINE)
            self.shared.begin_copy(places, PIECE, np.full(len(places), tag), where)
            self.barriers.bring(thread, barrier, places, values.reshape(-1, PIECE), where)

    def store(
        self,
        descriptor: Array,
        corner: list[Array],
        source: Array,
        mask: Array,
        programs: Array,
        where: str,
    ) -> None:
        """cp.async.bulk.tensor to global memory."""
        for thread in self._threads(mask, where):
            tensor, window, places = self._box(thread, descriptor, corner, source, mask, where)
            tags = np.full(len(places), self.shared.tags[thread])
            values = self.shared.read(places, PIECE, tags, where).reshape(*tensor.box, tensor.item)
            self.shared.begin_use(places, PIECE)
            self.stores.append((thread, int(self.committed[thread]), places))

            storage = self._storage(tensor, window, where)
            if storage:
                writers = window.view(storage.writers)
                if ((writers != NOBODY) & (writers != programs[thread])).any():
                    self.reports.add(f"two programs write one byte of {storage.name} at {where}")
                window.view(storage.content)[:] = values[window.inside]
                writers[:] = programs[thread]

    def commit(self, mask: Array) -> None:
        """What the threads in ``mask`` stored so far is a group."""
        self.committed += mask

    def wait(self, allowed: int, mask: Array) -> None:
        """Until shared memory is read for all but ``allowed`` of a thread's groups."""
        left = []
        for thread, group, places in self.stores:
            if mask[thread] and group < self.committed[thread] - allowed:
                self.shared.end_use(places, PIECE)
            else:
                left.append((thread, group, places))
        self.stores = left

    def _threads(self, mask: Array, where: str) -> list[int]:
        """The threads of ``mask``. A copy by several threads of a warp would be several copies."""
        threads = np.flatnonzero(mask)
        if len(np.unique(threads // 32)) < len(threads):
            self.reports.add(f"several threads of a warp start the same copy at {where}")
        return [int(thread) for thread in threads]

    def _box(
        self,
        thread: int,
        descriptor: Array,
        corner: list[Array],
        address: Array,
        mask: Array,
        where: str,
    ) -> tuple[TensorMap, Window, Array]:
        """(tensor, window, places of its pieces in shared memory) of one thread's box."""
        tensor = self.maps[_of(descriptor, thread, mask) & 0xFFFF]
        first = [_signed(_of(axis, thread, mask)) for axis in reversed(corner)]
        start = [max(at, 0) for at in first]
        stop = [
            min(at + size, limit)
            for at, size, limit in zip(first, tensor.box, tensor.shape, strict=True)
        ]
        lengths = [max(b - a, 0) for a, b in zip(start, stop, strict=True)]
        inside = tuple(
            slice(a - at, a - at + n) for a, at, n in zip(start, first, lengths, strict=True)
        )
        offset = (
            sum(a * stride for a, stride in zip(start, tensor.strides, strict=True)) * tensor.item
        )
        strides = (*(stride * tensor.item for stride in tensor.strides), 1)
        return (
            tensor,
            Window(inside, offset, (*lengths, tensor.item), strides),
            self._places(tensor, _of(address, thread, mask), thread // self.shared.threads, where),
        )

    def _places(self, tensor: TensorMap, address: int, program: int, where: str) -> Array:
        """Where the box lies in shared memory, a number for each PIECE, in the order of the box."""
        span = SPANS[tensor.swizzle]
        size = int(np.prod(tensor.box)) * tensor.item
        if address % max((span + 1) * 128 if span else 0, 128):
            self.reports.add(f"a box at an address that its layout does not allow at {where}")
        if address + size > self.shared.size:
            self.reports.add(f"a box of {size} bytes beyond shared memory at {where}")
        pieces = address // PIECE + np.arange(size // PIECE)
        pieces ^= (pieces >> 3) & span
        return pieces + program * self.shared.stride // PIECE

    def _storage(self, tensor: TensorMap, window: Window, where: str) -> Storage | None:
        """What holds the tensor, cut so that the window's offsets count from its address.

        None for a window of nothing.
        """
        storage = self.memory.find(tensor.address)
        if 0 in window.shape:
            return None
        last = window.offset + sum(
            (n - 1) * s for n, s in zip(window.shape, window.strides, strict=True)
        )
        if storage is None or tensor.address + last >= storage.stop:
            self.reports.add(f"a box out of its tensor's memory at {where}")
            return None
        skip = tensor.address - storage.start
        return storage._replace(content=storage.content[skip:], writers=storage.writers[skip:])


def _of(value: Array, thread: int, mask: Array) -> int:
    return int(np.broadcast_to(value, mask.shape)[thread])


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value
