"""V-MoE's sharded msgpack checkpoints of the official JAX code, read into numpy arrays.

Sizes in a file are claims: nothing is allocated before they agree with the bytes at hand, and
nothing is unpickled. The files have no checksums: a bit changed inside a weight or a name cannot be
noticed.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ironmoe.moe.checkpoints.arrays import ITEMSIZE, decode, file_size, require_shape
from ironmoe.moe.checkpoints.errors import reading, require, short
from ironmoe.moe.checkpoints.vmoe_format import (
    CHUNKS_KEY,
    INDEX_INFO,
    MAX_ITEMS,
    MAX_PATH,
    NDARRAY,
    SLICES,
    VERSION,
    Box,
    box_size,
    box_slices,
    msgpack_module,
    shard_file,
)


class _Leaf(NamedTuple):
    """An array as the index describes it. shard_of: which data file holds a part."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    shard_of: dict[Box, int]


def read_vmoe_checkpoint(prefix: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read ``<prefix>.index`` and its ``<prefix>.data-00000-of-0000n``, written by the official
    V-MoE code.

    prefix: the common beginning of the files' names; with ``.index`` at its end it is taken too.

    Returns flax paths joined by "/", such as "Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel", in
    the order of the leaves, to arrays in their stored shape and dtype; bfloat16 becomes float32,
    exactly. A "params" that is the only root is left out of the paths.

    Source: vmoe/checkpoints of github.com/google-research/vmoe.

    CheckpointError: a file is missing, truncated, corrupt or foreign.
    ImportError: msgpack is not installed.
    """
    base = os.fspath(prefix).removesuffix(".index")
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

    arrays = [
        np.empty(leaf.shape, "float32" if leaf.dtype == "bfloat16" else leaf.dtype)
        for leaf in leaves
    ]
    for shard in sorted(claims):
        _read_shard(shard_file(base, shard, shards), shard, leaves, arrays)

    root = "params/" if all(leaf.path.startswith("params/") for leaf in leaves) else ""
    return {leaf.path.removeprefix(root): array for leaf, array in zip(leaves, arrays, strict=True)}


def _read_index(file: Path) -> tuple[list[_Leaf], int]:
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


def _parse_leaf(path: str, info: Any, shards: int, where: str) -> _Leaf:
    shaped, parts, numbers = _record(_extension(info, INDEX_INFO, where), 3, where)
    shape, name, _, _ = _record(shaped, 4, where)
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

    boxes = [_parse_box(part, shape, where) for part in parts]
    require(
        sum(map(box_size, boxes)) == math.prod(shape),
        where,
        boxes,
        f"parts of {math.prod(shape)} elements in all",
    )
    return _Leaf(path, tuple(shape), name.decode(), dict(zip(boxes, numbers, strict=True)))


def _parse_box(data: Any, shape: tuple[int, ...], where: str) -> Box:
    box = []
    for axis, size in zip(_record(data, len(shape), where), shape, strict=True):
        start, stop, step = _record(axis, 3, where)
        start = 0 if start is None else start
        stop = size if stop is None else stop
        valid = type(start) is type(stop) is int and 0 <= start < stop <= size and step in (None, 1)
        require(valid, where, [start, stop, step], f"[start, stop, None] within 0 and {size}")
        box.append((start, stop))
    return tuple(box)


def _require_disjoint(leaf: _Leaf, where: str) -> None:
    """CheckpointError unless each element lies in exactly one part.

    The parts have as many elements as the leaf (``_parse_leaf`` checks it). So if they leave none
    out, no two of them overlap.
    """
    covered = np.zeros(leaf.shape, bool)
    for box in leaf.shard_of:
        covered[box_slices(box)] = True
    require(bool(covered.all()), where, "parts that overlap", "parts that cover each element once")


def _read_shard(file: Path, shard: int, leaves: list[_Leaf], arrays: list[np.ndarray]) -> None:
    """Fill the arrays with the parts in this data file. They must be the parts that the index
    promises."""
    data = _unpack(_read_file(file), file)
    require(
        isinstance(data, dict) and CHUNKS_KEY in data,
        file,
        data,
        "the data file of a V-MoE checkpoint",
    )
    del data[CHUNKS_KEY]

    for number, (leaf, array) in enumerate(zip(leaves, arrays, strict=True)):
        boxes = {box for box, where_stored in leaf.shard_of.items() if where_stored == shard}
        where = f"{file}: leaf {leaf.path}"
        chunks = data.pop(str(number), [])
        require(
            isinstance(chunks, list) and len(chunks) == len(boxes),
            where,
            chunks,
            f"{len(boxes)} parts",
        )
        for chunk in chunks:
            require(isinstance(chunk, list) and len(chunk) == 2, where, chunk, "[pieces, slices]")
            box = _parse_box(_extension(chunk[1], SLICES, where), leaf.shape, where)
            require(box in boxes, where, list(box), "a part that the index says is here, once")
            boxes.remove(box)
            values = _parse_pieces(chunk[0], leaf.dtype, box_size(box), where)
            array[box_slices(box)] = values.reshape([stop - start for start, stop in box])

    require(not data, file, data, f"leaves with numbers below {len(leaves)}")


def _parse_pieces(pieces: Any, dtype: str, size: int, where: str) -> np.ndarray:
    """The ``size`` values of a part, stored flat in one or more pieces."""
    require(isinstance(pieces, list), where, pieces, "a list of pieces")
    contents = []
    for piece in pieces:
        shape, name, content = _record(_extension(piece, NDARRAY, where), 3, where)
        require(
            name == dtype.encode() and isinstance(content, bytes),
            where,
            [name, content],
            f"[{dtype}, bytes]",
        )
        n, rest = divmod(len(content), ITEMSIZE[dtype])
        require(
            shape == [n] and rest == 0,
            where,
            f"shape {short(shape)} of {len(content)} bytes",
            f"shape [{n}]",
        )
        contents.append(content)

    values = b"".join(contents)
    needed = size * ITEMSIZE[dtype]
    require(len(values) == needed, where, f"{len(values)} bytes", f"{needed} bytes")
    return decode(values, dtype)


def _read_file(file: Path) -> bytes:
    file_size(file)  # CheckpointError unless it is a plain file
    with reading(file, "a file"):
        return file.read_bytes()


def _unpack(data: bytes, where: object, raw: bool = False) -> Any:
    msgpack = msgpack_module()
    with reading(where, "msgpack"):
        return msgpack.unpackb(data, raw=raw, max_array_len=MAX_ITEMS)


def _extension(value: Any, code: int, where: str) -> bytes:
    """The content of a msgpack extension value with this code."""
    require(
        isinstance(value, msgpack_module().ExtType) and value.code == code,
        where,
        value,
        f"msgpack extension {code}",
    )
    return value.data


def _record(data: Any, length: int, where: str) -> list[Any]:
    """The fields of a list that is packed as bytes inside another value."""
    require(isinstance(data, bytes), where, data, "packed bytes")
    fields = _unpack(data, where, raw=True)
    require(isinstance(fields, list) and len(fields) == length, where, fields, f"{length} fields")
    return fields
