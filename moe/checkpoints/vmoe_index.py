"""The index of a V-MoE checkpoint: which arrays it has, and which data file holds which part.

Sizes in a file are claims: they are checked before anything is allocated.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ironmoe.moe.checkpoints.arrays import ITEMSIZE, file_size, require_shape
from ironmoe.moe.checkpoints.errors import reading, require
from ironmoe.moe.checkpoints.vmoe_format import (
    INDEX_INFO,
    MAX_ITEMS,
    MAX_PATH,
    VERSION,
    Box,
    box_size,
    box_slices,
    msgpack_module,
    shard_file,
)


class StoredLeaf(NamedTuple):
    """An array as the index describes it. shard_of: which data file holds a part."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    shard_of: dict[Box, int]


def read_index(base: str) -> tuple[list[StoredLeaf], int]:
    """The arrays (leaves) of ``<base>.index`` in their order, and the number of data files.

    CheckpointError: the index is missing, corrupt or foreign, a data file is missing or smaller
    than the index claims, or the parts of an array do not cover it once.
    """
    leaves, shards = _read_index(index_file := Path(f"{base}.index"))

    # Before any array is allocated: each data file is as large as the index claims.
    claims: Counter[int] = Counter()
    for leaf in leaves:
        for box, shard in leaf.shard_of.items():
            claims[shard] += box_size(box) * ITEMSIZE[leaf.dtype]
    for shard, claim in claims.items():
        size = file_size(file := shard_file(base, shard, shards))
        require(claim <= size, file, f"{size} bytes", f"{claim} or more, as {index_file} says")
    for leaf in leaves:
        _require_disjoint(leaf, f"{index_file}: leaf {leaf.path}")
    return leaves, shards


def _read_index(file: Path) -> tuple[list[StoredLeaf], int]:
    """The leaves in their order, and the number of data files."""
    index = _unpack(_read_file(file), file)
    require(
        isinstance(index, dict) and isinstance(index.get("index"), dict),
        file,
        index,
        "a V-MoE checkpoint's index",
    )
    version = index.get("version")
    require(version in (None, VERSION), file, version, f"version {VERSION} or none")
    shards = index.get("shard_count")
    require(type(shards) is int and shards >= 1, file, shards, "a positive shard_count")

    tree = index["index"]
    leaves = [
        _parse_leaf(path, info, shards, f"{file}: leaf {path}")
        for path, info in _flatten(tree, file)
    ]
    require(
        len({leaf.path for leaf in leaves}) == len(leaves) > 0,
        file,
        list(tree),
        "leaves with different paths",
    )
    return leaves, shards


def _flatten(tree: dict[str, Any], file: Path) -> Iterator[tuple[str, Any]]:
    """Nested dicts → (path, leaf), in the order of the leaves' numbers.

    JAX sorts the keys of a dict and writes them in this order. Keys in another order come from a
    class or a list, which an older file may hold, or from a damaged name: then the numbers are not
    known, and CheckpointError is raised.
    """
    stack = [("", tree)]  # no recursion: a file may nest deeper than Python does
    while stack:
        path, node = stack.pop()
        require(len(path) <= MAX_PATH, file, path, f"paths of at most {MAX_PATH} characters")
        if isinstance(node, dict):
            in_order = all(isinstance(key, str) for key in node) and list(node) == sorted(node)
            require(
                in_order,
                f"{file}: leaf {path}" if path else file,
                list(node),
                "names in sorted order",
            )
            stack += [(f"{path}/{key}" if path else key, node[key]) for key in reversed(node)]
        elif node is not None:  # JAX counts None as a tree without leaves
            yield path, node


def _parse_leaf(path: str, info: Any, shards: int, where: str) -> StoredLeaf:
    shaped, parts, numbers = record(extension(info, INDEX_INFO, where), 3, where)
    shape, name, _, _ = record(shaped, 4, where)
    require_shape(shape, where)
    known = isinstance(name, bytes) and name.decode(errors="replace") in ITEMSIZE
    require(known, where, name, f"a dtype among {', '.join(ITEMSIZE)}")

    paired = isinstance(parts, list) and isinstance(numbers, list) and len(parts) == len(numbers)
    require(paired, where, [parts, numbers], "a list of parts and one of their data files")
    require(
        all(type(n) is int and 0 <= n < shards for n in numbers),
        where,
        numbers,
        f"data files below {shards}",
    )

    boxes = [parse_box(part, shape, where) for part in parts]
    require(
        sum(map(box_size, boxes)) == math.prod(shape),
        where,
        boxes,
        f"parts of {math.prod(shape)} elements in all",
    )
    return StoredLeaf(path, tuple(shape), name.decode(), dict(zip(boxes, numbers, strict=True)))


def parse_box(data: Any, shape: tuple[int, ...], where: str) -> Box:
    box = []
    for axis, size in zip(record(data, len(shape), where), shape, strict=True):
        start, stop, step = record(axis, 3, where)
        start = 0 if start is None else start
        stop = size if stop is None else stop
        valid = type(start) is type(stop) is int and 0 <= start < stop <= size and step in (None, 1)
        require(valid, where, [start, stop, step], f"[start, stop, None] within 0 and {size}")
        box.append((start, stop))
    return tuple(box)


def _require_disjoint(leaf: StoredLeaf, where: str) -> None:
    """CheckpointError unless each element lies in exactly one part.

    The parts have as many elements as the leaf (``_parse_leaf`` checks it). So if they leave none
    out, no two of them overlap. The borders of the parts cut each axis into intervals: instead of
    elements, the cells that these make are marked, of which there are few.
    """
    borders = [
        np.unique([0, size, *(border for box in leaf.shard_of for border in box[axis])])
        for axis, size in enumerate(leaf.shape)
    ]
    covered = np.zeros([len(border) - 1 for border in borders], bool)
    for box in leaf.shard_of:
        cells = [
            tuple(np.searchsorted(border, axis).tolist())
            for border, axis in zip(borders, box, strict=True)
        ]
        covered[box_slices(tuple(cells))] = True
    require(bool(covered.all()), where, "parts that overlap", "parts that cover each element once")


def _read_file(file: Path) -> bytes:
    file_size(file)  # CheckpointError unless it is a plain file
    with reading(file, "a file"):
        return file.read_bytes()


def _unpack(data: bytes, where: object, raw: bool = False) -> Any:
    msgpack = msgpack_module()
    with reading(where, "msgpack"):
        return msgpack.unpackb(data, raw=raw, max_array_len=MAX_ITEMS)


def extension(value: Any, code: int, where: str) -> bytes:
    """The content of a msgpack extension value with this code."""
    require(
        isinstance(value, msgpack_module().ExtType) and value.code == code,
        where,
        value,
        f"msgpack extension {code}",
    )
    return value.data


def record(data: Any, length: int, where: str) -> list[Any]:
    """The fields of a list that is packed as bytes inside another value."""
    require(isinstance(data, bytes), where, data, "packed bytes")
    fields = _unpack(data, where, raw=True)
    require(isinstance(fields, list) and len(fields) == length, where, fields, f"{length} fields")
    return fields
