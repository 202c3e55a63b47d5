"""wgmma: products of 64 rows by four warps, which read their operands from shared memory on their
own until they are waited for.
"""

import numpy as np

from ptx.numbers import Array, f32, f64, i64, number, u16, u32
from ptx.reports import Fault, Reports
from ptx.shared_memory import MATRIX, SharedMemory

GROUP = 128  # threads
PIECE = 16  # bytes
SPANS = {1: 128, 2: 64, 3: 32, 0: 16}  # layout mode → bytes of a row
MIXED = {1: 7, 2: 3, 3: 1, 0: 0}  # → which bits of the row an address is mixed with


class MatrixUnit:
    """The products of a batch of programs, and which operands are still being read."""

    def __init__(self, shared: SharedMemory, threads: int, reports: Reports) -> None:
        self.shared, self.reports = shared, reports
        # By group of warps: open group last
        self.reading: list[list[list[Array]]] = [[[]] for _ in range(threads // GROUP)]

    def multiply(
        self, columns: int, terms: int, kind: str, left: list[Array] | Array, right: Array,
        sums: list[Array],
        keep: Array, transposed: tuple[bool, bool], mask: Array, where: str,
    ) -> list[Array]:  # fmt: skip
        """D (64, columns) += A (64, terms) B for each group of warps; ``left`` is registers or a
        descriptor, ``right`` a descriptor.

        keep: whether what was in D counts. transposed: whether A's rows, or B's columns, are the
            ones that lie contiguous.
        """
        results = np.stack(sums)
        for group in np.flatnonzero(mask.reshape(-1, GROUP).any(1)):
            own = slice(GROUP * group, GROUP * (group + 1))
            if isinstance(left, list):
                a_MK = _registers([register[own] for register in left], kind)
            else:
                a_MK = number(
                    self._operand(group, left[own], 64, terms, transposed[0], where), kind
                )
            b_NK = number(
                self._operand(group, right[own], columns, terms, transposed[1], where), kind
            )

            # (warp, half of its rows, row, block, pair, column)
            d_MN = (a_MK @ b_NK.T).reshape(4, 2, 8, columns // 8, 4, 2)
            product = d_MN.transpose(3, 1, 5, 0, 2, 4).reshape(columns // 2, GROUP)
            kept = np.broadcast_to(keep, mask.shape)[own]
            before = np.where(kept, results[:, own].view(f32), f32(0))
            results[:, own] = (product + before).astype(f32).view(u32)
        return list(results)

    def commit(self, mask: Array) -> None:
        """What was started so far is a group of products."""
        for group in np.flatnonzero(mask.reshape(-1, GROUP).any(1)):
            self.reading[group].append([])

    def wait(self, allowed: int, mask: Array) -> None:
        """Until at most ``allowed`` groups of products are at work."""
        for group in np.flatnonzero(mask.reshape(-1, GROUP).any(1)):
            groups = self.reading[group]
            while len(groups) - 1 > allowed:
                for places in groups.pop(0):
                    self.shared.end_use(places, PIECE)

    def _operand(
        self, group: int, descriptor: Array, rows: int, terms: int, transposed: bool, where: str
    ) -> Array:
        """(rows, terms) 16-bit numbers that a descriptor means."""
        if (descriptor != descriptor[0]).any():
            raise Fault(f"the threads of a group have different descriptors at {where}")
        pieces = _pieces(int(descriptor[0]), rows, terms, transposed)
        if (pieces.max() + 1) * PIECE > self.shared.size:
            raise Fault(f"a matrix beyond shared memory at {where}")

        program = int(group) * GROUP // self.shared.threads
        places = pieces + program * self.shared.stride // PIECE
        tags = np.full(places.shape, self.shared.unit_tag(program, MATRIX))
        content = self.shared.read(places, PIECE, tags, where).view(u16)  # (…, 8 numbers)
        self.shared.begin_use(places, PIECE)
        self.reading[group][-1].append(places)
        if transposed:
            return content.transpose(0, 2, 1).reshape(rows, terms)
        return content.reshape(rows, terms)


def _pieces(descriptor: int, rows: int, terms: int, transposed: bool) -> Array:
    """Numbers of the 16-byte pieces: (rows, terms / 8), or where rows lie contiguous (rows / 8,
    terms).
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = descriptor >> 62 & 3
    span = SPANS[mode]
    if transposed:
        row, term = (
            8 * np.arange(rows // 8, dtype=i64)[:, None],
            np.arange(terms, dtype=i64)[None, :],
        )
        width = span // 2
        address = (
            start + row // width * leading + term // 8 * stride + term % 8 * span + row % width * 2
        )
    else:
        row, term = (
            np.arange(rows, dtype=i64)[:, None],
            8 * np.arange(terms // 8, dtype=i64)[None, :],
        )
        address = start + row // 8 * stride + row % 8 * span + term * 2
    address ^= (address >> 7 & MIXED[mode]) << 4
    return address // PIECE


def _registers(registers: list[Array], kind: str) -> Array:
    """(64, 4 · len(registers)) float64 from A in registers."""
    thread = np.arange(GROUP)
    warp, row, pair = thread // 32, thread % 32 // 4, thread % 4
    a_MK = np.zeros((64, 4 * len(registers)), f64)
    for i, register in enumerate(registers):
        for half in (0, 1):
            numbers = number((register >> u32(16 * half)).astype(u16), kind)
            a_MK[16 * warp + row + 8 * (i & 1), 2 * pair + half + 8 * (i >> 1)] = numbers
    return a_MK
