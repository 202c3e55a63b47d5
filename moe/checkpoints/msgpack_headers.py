"""The headers of msgpack values in a file, by which large values can be passed over or read in
part. msgpack's own reader takes a value whole.

Source: github.com/msgpack/msgpack/blob/master/spec.md.
"""

from typing import Any, BinaryIO, NamedTuple

from ironmoe.moe.checkpoints.errors import require
from ironmoe.moe.checkpoints.vmoe_format import MAX_PATH, msgpack_module

# The first byte → (the kind, how many bytes tell its length).
_SIZED = {
    0xC4: ("bin", 1),
    0xC5: ("bin", 2),
    0xC6: ("bin", 4),
    0xC7: ("ext", 1),
    0xC8: ("ext", 2),
    0xC9: ("ext", 4),
    0xD9: ("str", 1),
    0xDA: ("str", 2),
    0xDB: ("str", 4),
    0xDC: ("array", 2),
    0xDD: ("array", 4),
    0xDE: ("map", 2),
    0xDF: ("map", 4),
}
_LONGEST = 6  # bytes of a header
_LONGEST_NUMBER = 9
_BUFFER = 1 << 12  # msgpack's own has a megabyte


class Header(NamedTuple):
    """kind: "map", "array", "str", "bin", "ext", or "other" for a number, a truth value or nil.
    length: how many entries, or bytes. start: where they begin in the file. code: of an ext."""

    kind: str
    length: int
    start: int
    code: int | None = None

    @property
    def stop(self) -> int:
        """Where the bytes of a str, bin or ext end."""
        return self.start + self.length

    def __repr__(self) -> str:
        """For messages: what was found."""
        if self.kind == "ext":
            return f"msgpack extension {self.code} of {self.length} bytes"
        unit = "entries" if self.kind in ("map", "array") else "bytes"
        return f"{self.kind} of {self.length} {unit}" if self.kind != "other" else "a number or nil"


class MsgpackFile:
    """Values of a msgpack file at positions in it.

    where: names the file in messages; size: its bytes, which no value may pass.
    """

    def __init__(self, stream: BinaryIO, size: int, where: object) -> None:
        self.stream, self.size, self.where = stream, size, where

    def header(self, position: int) -> Header:
        """Of the value at a position."""
        head = self.bytes(position, min(_LONGEST, self.size - position))
        require(len(head) > 0, self.where, f"an end at {position}", "a value")
        first = head[0]
        if first in _SIZED:
            kind, width = _SIZED[first]
            length, start = int.from_bytes(head[1 : 1 + width], "big"), position + 1 + width
        elif 0xD4 <= first <= 0xD8:
            kind, length, start, width = "ext", 1 << (first - 0xD4), position + 1, 0
        elif 0x80 <= first <= 0xBF:
            kind = "map" if first < 0x90 else "array" if first < 0xA0 else "str"
            length, start = first & (0x1F if kind == "str" else 0x0F), position + 1
        else:
            return Header("other", 0, position)

        code = None
        if kind == "ext":  # its code stands between its length and its content
            code = int.from_bytes(head[start - position : start - position + 1], "big", signed=True)
            start += 1
        needed = length if kind in ("str", "bin", "ext") else 0
        whole = start + needed <= self.size
        require(whole, self.where, f"{self.size} bytes", f"{start + needed} or more for a {kind}")
        return Header(kind, length, start, code)

    def bytes(self, position: int, count: int) -> bytes:
        """``count`` bytes, of which the file has that many."""
        self.stream.seek(position)
        content = self.stream.read(count)
        require(len(content) == count, self.where, f"{len(content)} bytes", f"{count}")
        return content

    def small_value(self, position: int) -> tuple[Any, int]:
        """(a number, a truth value, nil or a short text; where the next value begins)."""
        header = self.header(position)
        small = header.kind == "other" or (header.kind == "str" and header.length <= MAX_PATH)
        require(small, self.where, header, "a number or a short text")
        stop = header.stop if header.kind == "str" else min(position + _LONGEST_NUMBER, self.size)
        unpacker = msgpack_module().Unpacker(read_size=_BUFFER)
        unpacker.feed(self.bytes(position, stop - position))
        return unpacker.unpack(), position + unpacker.tell()

    def end(self, position: int) -> int:
        """Where a value ends, whatever it is. It is passed over in blocks."""
        self.stream.seek(position)
        limits = {"read_size": _BUFFER, "max_buffer_size": _BUFFER + self.size}
        unpacker = msgpack_module().Unpacker(self.stream, **limits)
        unpacker.skip()
        return position + unpacker.tell()
