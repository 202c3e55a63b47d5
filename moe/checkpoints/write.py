"""Weights written as a checkpoint that the official V-MoE code reads."""

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ironmoe.moe.checkpoints.arrays import ITEMSIZE, MAX_AXES
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

_MAX_CHUNK_BYTES = 1 << 30  # the official code stores larger parts in several pieces


def write_vmoe_checkpoint(
    prefix: str | os.PathLike[str],
    params: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    chunk_bytes: int = 1 << 28,
) -> None:
    """Write ``<prefix>.index`` and ``<prefix>.data-00000-of-0000n``, for ``read_vmoe_checkpoint``
    and the official V-MoE code.

    prefix: the common beginning of the files' names, in a folder that exists; with ``.index`` at
        its end it is taken too.
    params: flax paths joined by "/" to arrays of any shape that has an element; bool, integers,
        float16, float32, float64, or bfloat16 of ml_dtypes.
    shards: number of data files, about equally large.
    chunk_bytes: parts of an array have at most so many bytes (or one element); they may lie in
        different files.

    All files are written whole under temporary names. Then an older index is removed, the data
    files get their names, and the index gets its name last. So an interrupted call leaves the older
    checkpoint, none, or the new one, and never a mixture.

    Source of the format: vmoe/checkpoints of github.com/google-research/vmoe.

    ValueError, TypeError: a path, an array or a number that the format cannot hold.
    ImportError: msgpack is not installed.
    """
    if not 1 <= shards <= 99_999:
        raise ValueError(f"shards must be 1 to 99999, got {shards}")
    if not 1 <= chunk_bytes <= _MAX_CHUNK_BYTES:
        raise ValueError(f"chunk_bytes must be 1 to {_MAX_CHUNK_BYTES}, got {chunk_bytes}")

    base = os.fspath(prefix).removesuffix(".index")
    # JAX numbers leaves by the sorted keys of each dict
    in_order = sorted(params, key=lambda path: path.split("/"))
    leaves = [(path, _checked(path, params[path])) for path in in_order]
    if not leaves:
        raise ValueError("params must hold one array or more, got none")

    index, parts_by_shard = _place(leaves, shards, chunk_bytes)
    files = [*(shard_file(base, shard, shards) for shard in range(shards)), Path(f"{base}.index")]
    # the official code gives unfinished files these names, too
    unfinished = [file.with_name(f".tmp.{file.name}") for file in files]
    contents = [*(_shard_content(leaves, parts) for parts in parts_by_shard), iter([index])]

    try:
        for temporary, content in zip(unfinished, contents, strict=True):
            with open(temporary, "wb") as stream:
                stream.writelines(content)
                stream.flush()
                os.fsync(stream.fileno())

        files[-1].unlink(missing_ok=True)
        for temporary, file in zip(unfinished, files, strict=True):
            temporary.replace(file)
    finally:
        for temporary in unfinished:
            temporary.unlink(missing_ok=True)


def _checked(path: str, value: Any) -> np.ndarray:
    """The array, or an error that says why the format cannot hold it."""
    if len(path) > MAX_PATH or not all(path.split("/")):
        raise ValueError(
            f"params must have paths of names joined by '/', at most {MAX_PATH} characters, got "
            f"{path!r}"
        )
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"params[{path!r}] must be a numpy array, got {type(value).__name__}")
    array = np.asarray(value)
    if array.dtype.name not in ITEMSIZE:
        raise TypeError(
            f"params[{path!r}] must be of a dtype among {', '.join(ITEMSIZE)}, got {array.dtype}"
        )
    if array.size == 0 or array.ndim > MAX_AXES:
        raise ValueError(
            f"params[{path!r}] must have an element and at most {MAX_AXES} axes, got shape "
            f"{array.shape}"
        )
    return array


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Sorted paths joined by "/" → nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"params[{path!r}] must not lie below the path of another array")
        node[name] = leaf
    return tree


def _place(
    leaves: list[tuple[str, np.ndarray]], shards: int, chunk_bytes: int
) -> tuple[bytes, list[dict[int, list[Box]]]]:
    """Split the arrays into parts and give each part to the data file that is the smallest so far.

    Returns the packed index, and for each data file its parts by the number of their leaf.
    """
    msgpack = msgpack_module()
    infos: dict[str, Any] = {}
    parts_by_shard: list[dict[int, list[Box]]] = [{} for _ in range(shards)]
    sizes = [0] * shards
    for number, (path, array) in enumerate(leaves):
        name = array.dtype.name
        boxes = _split(path, array.shape, max(1, chunk_bytes // ITEMSIZE[name]))
        numbers = []
        for box in boxes:
            shard = sizes.index(min(sizes))
            sizes[shard] += box_size(box) * ITEMSIZE[name]
            parts_by_shard[shard].setdefault(number, []).append(box)
            numbers.append(shard)

        # False: the type is not one of JAX's weak types. {}: no axis has a name.
        shaped = msgpack.packb((array.shape, name, False, {}))
        infos[path] = msgpack.ExtType(
            INDEX_INFO, msgpack.packb((shaped, [_pack_box(box) for box in boxes], numbers))
        )

    index = {"version": VERSION, "shard_count": shards, "index": _nest(infos)}
    return msgpack.packb(index), parts_by_shard


def _split(path: str, shape: tuple[int, ...], limit: int) -> list[Box]:
    """Cut an array into parts of at most ``limit`` elements, in the order of their first elements.
    Each part is one stretch of memory, as long as the limit allows."""
    steps: list[int] = []
    for size in reversed(shape):
        steps.insert(0, min(size, limit // math.prod(steps)))

    count = math.prod(-(-size // step) for size, step in zip(shape, steps, strict=True))
    if count > MAX_ITEMS:
        raise ValueError(
            f"chunk_bytes splits params[{path!r}] into {count} parts, at most {MAX_ITEMS} are "
            "allowed"
        )

    axes = (
        [(i, min(i + step, size)) for i in range(0, size, step)]
        for size, step in zip(shape, steps, strict=True)
    )
    return list(itertools.product(*axes))


def _shard_content(
    leaves: list[tuple[str, np.ndarray]], parts: dict[int, list[Box]]
) -> Iterator[bytes]:
    """The bytes of a data file, part by part, so that no second copy of the weights is held."""
    msgpack = msgpack_module()
    packer = msgpack.Packer()
    yield packer.pack_map_header(1 + len(parts)) + packer.pack(CHUNKS_KEY) + packer.pack(True)
    for number, boxes in parts.items():
        array = leaves[number][1]
        yield packer.pack(str(number)) + packer.pack_array_header(len(boxes))
        for box in boxes:
            part = _pack_values(array[box_slices(box)])
            yield packer.pack(
                [[msgpack.ExtType(NDARRAY, part)], msgpack.ExtType(SLICES, _pack_box(box))]
            )


def _pack_values(part: np.ndarray) -> bytes:
    """The values of a part, flat and little-endian."""
    name = part.dtype.name
    if name == "bfloat16":  # numpy knows no byte order of it
        bits = part.view(np.uint16).astype("<u2")
    else:
        bits = part.astype(np.dtype(name).newbyteorder("<"))
    return msgpack_module().packb(((part.size,), name, bits.tobytes()))


def _pack_box(box: Box) -> bytes:
    packb = msgpack_module().packb
    return packb([packb((start, stop, None)) for start, stop in box])
