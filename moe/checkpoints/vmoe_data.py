"""The data files of a V-MoE checkpoint: where in a file each part lies, and its values.

A file is never read whole: its headers say where the values are, and these are read row by row.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ironmoe.moe.checkpoints.arrays import ITEMSIZE, MAX_AXES, decode, file_size
from ironmoe.moe.checkpoints.errors import reading, require
from ironmoe.moe.checkpoints.msgpack_headers import Header, MsgpackFile
from ironmoe.moe.checkpoints.vmoe_format import CHUNKS_KEY, NDARRAY, SLICES, Box, box_size
from ironmoe.moe.checkpoints.vmoe_index import StoredLeaf, parse_box

_BLOCK = 1 << 22  # bytes that are decoded at a time, or one row if that has more


class StoredPart(NamedTuple):
    """A part of an array in a data file: flat, in one or more pieces of bytes (start, stop)."""

    file: Path
    box: Box
    dtype: str
    pieces: list[tuple[int, int]]

    def rows(self, begin: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows of the part's first axis, a few at a time: (the number of the first, the rows)."""
        shape = [stop - start for start, stop in self.box] or [1]
        row_bytes = math.prod(shape[1:]) * ITEMSIZE[self.dtype]
        step = max(1, _BLOCK // row_bytes)
        with reading(self.file, "a file"), open(self.file, "rb") as stream:
            for i in range(begin, end, step):
                j = min(i + step, end)
                yield i, self._values(stream, i * row_bytes, j * row_bytes, [j - i, *shape[1:]])

    def _values(self, stream: BinaryIO, begin: int, end: int, shape: list[int]) -> np.ndarray:
        return decode(self._bytes(stream, begin, end), self.dtype).reshape(shape)

    def _bytes(self, stream: BinaryIO, begin: int, end: int) -> bytes:
        """Bytes of the part, counted over its pieces."""
        contents = []
        for start, stop in self.pieces:
            first, last = max(begin, 0), min(end, stop - start)
            if first < last:
                stream.seek(start + first)
                contents.append(stream.read(last - first))
            begin, end = begin - (stop - start), end - (stop - start)
        return contents[0] if len(contents) == 1 else b"".join(contents)


def find_parts(file: Path, shard: int, leaves: list[StoredLeaf]) -> dict[int, list[StoredPart]]:
    """The parts in a data file by the numbers of their leaves. They must be the parts that the
    index promises to be in this file, which has the number ``shard``."""
    size = file_size(file)
    with reading(file, "msgpack"), open(file, "rb") as stream:
        data = MsgpackFile(stream, size, file)
        head = data.header(0)
        require(head.kind == "map", file, head, "the data file of a V-MoE checkpoint")

        parts: dict[int, list[StoredPart]] = {}
        numbers = {str(number): number for number in range(len(leaves))}
        is_marked, foreign, position = False, [], head.start
        for _ in range(head.length):
            key, position = data.small_value(position)
            number = numbers.pop(key, None) if isinstance(key, str) else None
            if number is not None:
                parts[number], position = _parts_of_leaf(
                    data, position, file, shard, leaves[number]
                )
                continue
            if key == CHUNKS_KEY:
                is_marked = True
            else:
                foreign.append(key)
            position = data.end(position)

    require(is_marked, file, head, "the data file of a V-MoE checkpoint")
    for number, leaf in enumerate(leaves):
        promised = sum(where == shard for where in leaf.shard_of.values())
        if number not in parts:
            require(promised == 0, f"{file}: leaf {leaf.path}", [], f"{promised} parts")
    require(not foreign, file, foreign, f"leaves with numbers below {len(leaves)}")
    require(position == size, file, f"{size} bytes", f"{position}")
    return parts


def _parts_of_leaf(
    data: MsgpackFile, position: int, file: Path, shard: int, leaf: StoredLeaf
) -> tuple[list[StoredPart], int]:
    """(the parts of a leaf, where its chunks end)."""
    where = f"{file}: leaf {leaf.path}"
    boxes = {box for box, where_stored in leaf.shard_of.items() if where_stored == shard}
    position = _entries(data, position, len(boxes), where, f"{len(boxes)} parts").start

    parts = []
    for _ in range(len(boxes)):
        position = _entries(data, position, 2, where, "[pieces, slices]").start
        pieces, position = _pieces(data, position, leaf.dtype, where)

        slices = _extension(data, position, SLICES, where)
        box = parse_box(data.bytes(slices.start, slices.length), leaf.shape, where)
        require(box in boxes, where, list(box), "a part that the index says is here, once")
        boxes.remove(box)
        found = sum(stop - start for start, stop in pieces)
        needed = box_size(box) * ITEMSIZE[leaf.dtype]
        require(found == needed, where, f"{found} bytes", f"{needed} bytes")
        parts.append(StoredPart(file, box, leaf.dtype, pieces))
        position = slices.stop
    return parts, position


def _pieces(
    data: MsgpackFile, position: int, dtype: str, where: str
) -> tuple[list[tuple[int, int]], int]:
    """(where the values of each piece lie, where the list of pieces ends)."""
    header = _entries(data, position, None, where, "a list of pieces")
    pieces, position = [], header.start
    for _ in range(header.length):
        packed = _extension(data, position, NDARRAY, where)
        shape, name, content = _record_of_values(data, packed.start, where)
        is_content = content.kind in ("bin", "str")
        expected = f"[{dtype}, bytes]"
        require(name == dtype.encode() and is_content, where, [name, content], expected)

        n, rest = divmod(content.length, ITEMSIZE[dtype])
        words = f"shape {shape} of {content.length} bytes"
        require(shape == [n] and rest == 0, where, words, f"shape [{n}]")
        require(content.stop == packed.stop, where, f"{packed.length} bytes", "one array in them")
        pieces.append((content.start, content.stop))
        position = packed.stop
    return pieces, position


def _record_of_values(
    data: MsgpackFile, position: int, where: str
) -> tuple[list[object], bytes, Header]:
    """The fields of packed values: their shape, their dtype, and the header of their bytes."""
    position = _entries(data, position, 3, where, "3 fields").start
    header = _entries(data, position, None, where, "a shape")
    require(header.length <= MAX_AXES, where, header, f"a shape of at most {MAX_AXES} sizes")
    shape, position = [], header.start
    for _ in range(header.length):
        size, position = data.small_value(position)
        shape.append(size)

    name = data.header(position)
    is_name = name.kind in ("bin", "str") and name.length < 100
    require(is_name, where, name, "the name of a dtype")
    return shape, data.bytes(name.start, name.length), data.header(name.stop)


def _entries(
    data: MsgpackFile, position: int, length: int | None, where: str, expected: str
) -> Header:
    """The header of a list of so many entries."""
    header = data.header(position)
    found = header if header.kind != "other" else data.small_value(position)[0]
    right = header.kind == "array" and length in (None, header.length)
    require(right, where, found, expected)
    return header


def _extension(data: MsgpackFile, position: int, code: int, where: str) -> Header:
    header = data.header(position)
    require(
        header.kind == "ext" and header.code == code, where, header, f"msgpack extension {code}"
    )
    return header
