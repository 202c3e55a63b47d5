"""Checkpoints of the official JAX code, read into numpy arrays: V-MoE's sharded msgpack files and
the dense ViT's .npz.

Sizes in a file are claims: nothing is allocated before they agree with the bytes at hand, and
    nothing is unpickled.
The msgpack files have no checksums: a bit changed inside a weight or a name cannot be noticed. An
    .npz has them.
"""

import io
import math
import os
import reprlib
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VERSION = "20220622"  # files older than this have none
CHUNKS_KEY = "__msgpack_array_chunk_a87ca2__"  # marks a data file
NDARRAY, SLICES, INDEX_INFO = 1, 6, 8  # msgpack extension codes
# a list of msgpack takes memory by its claimed length: MAX_ITEMS bounds it
MAX_AXES, MAX_PATH, MAX_ITEMS = 32, 1000, 1 << 16
_INTS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
ITEMSIZE = {n: np.dtype(n).itemsize for n in ("bool", *_INTS, "float16", "float32", "float64")} | {
    "bfloat16": 2
}

Box = tuple[tuple[int, int], ...]  # a part of an array: (start, stop) along each axis


class CheckpointError(ValueError):
    """A checkpoint is missing, truncated, corrupt or foreign. The message names the file and, where
    one is concerned, the leaf."""


class _Leaf(NamedTuple):
    path: str
    shape: tuple[int, ...]
    dtype: str
    shard_of: dict[Box, int]  # the data file of each part


def read_vmoe_checkpoint(prefix: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read ``<prefix>.index`` and its ``<prefix>.data-00000-of-0000n``, written by the official
    V-MoE code.

    prefix: the common beginning of the files' names; with ``.index`` at its end it is taken too.
    Returns flax paths joined by "/", such as "Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel", in
    the order of the leaves, to arrays in their stored shape and dtype; bfloat16 becomes float32,
    exactly. A "params" that is the only root is
    left out of the paths. Source: vmoe/checkpoints of github.com/google-research/vmoe.

    CheckpointError: a file is missing, truncated, corrupt or foreign. ImportError: msgpack is not
        installed.
    """
    base = os.fspath(prefix).removesuffix(".index")
    leaves, shards = _read_index(index_file := Path(f"{base}.index"))
    claims: Counter[int] = Counter()
    for leaf in leaves:
        for box, shard in leaf.shard_of.items():
            claims[shard] += box_size(box) * ITEMSIZE[leaf.dtype]
    for shard, claim in claims.items():
        size = _file_size(file := shard_file(base, shard, shards))
        _require(claim <= size, file, f"{size} bytes", f"{claim} or more, as {index_file} says")
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


def read_npz_checkpoint(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a dense ViT's .npz of the official vision_transformer repository.

    Returns names such as "Transformer/encoderblock_0/LayerNorm_0/scale" to arrays in their stored
    shape and dtype; bfloat16, which numpy stores as two opaque bytes, becomes float32, exactly.
    Where names begin with "opt/target/" or "params/", only these entries are read, without that
    prefix (the others are an optimizer's state).

    CheckpointError: the file is missing, truncated, corrupt or foreign, or holds Python objects.
    """
    size = _file_size(file := Path(path))
    with _reading(file, "an .npz archive"), zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        _require(len(members) > 0, file, "an empty archive", "arrays")
        for root in ("opt/target/", "params/"):
            members = {
                n.removeprefix(root): info for n, info in members.items() if n.startswith(root)
            } or members
        return {
            name: _read_member(archive, info, size, f"{file}: leaf {name}")
            for name, info in members.items()
        }


def shard_file(base: str, shard: int, shards: int) -> Path:
    """The data file of a number, of a V-MoE checkpoint that has ``shards`` of them."""
    return Path(f"{base}.data-{shard:05d}-of-{shards:05d}")


def msgpack_module() -> Any:
    """msgpack, or an ImportError that says how to get it."""
    try:
        import msgpack
    except ImportError as error:
        raise ImportError("V-MoE checkpoints need msgpack: pip install msgpack") from error
    return msgpack


def _read_index(file: Path) -> tuple[list[_Leaf], int]:
    """The leaves in their order, and the number of data files."""
    index = _unpack(_read_file(file), file)
    _require(
        isinstance(index, dict) and isinstance(index.get("index"), dict),
        file,
        index,
        "a V-MoE checkpoint's index",
    )
    version, shards, tree = index.get("version"), index.get("shard_count"), index["index"]
    _require(version in (None, VERSION), file, version, f"version {VERSION} or none")
    _require(type(shards) is int and shards >= 1, file, shards, "a positive shard_count")
    leaves = [
        _parse_leaf(path, info, shards, f"{file}: leaf {path}")
        for path, info in _flatten(tree, file)
    ]
    _require(
        len({leaf.path for leaf in leaves}) == len(leaves) > 0,
        file,
        list(tree),
        "leaves with different paths",
    )
    return leaves, shards


def _flatten(tree: dict[str, Any], file: Path) -> Iterator[tuple[str, Any]]:
    """Nested dicts → (path, leaf) in the order of the leaves' numbers: JAX sorts the keys of a
    dict, and writes them so.

    Another order is that of a class or a list, which an older file may hold, or of a damaged name.
    It does not tell the numbers.
    """
    stack = [("", tree)]  # no recursion: a file may nest deeper than Python does
    while stack:
        path, node = stack.pop()
        _require(len(path) <= MAX_PATH, file, path, f"paths of at most {MAX_PATH} characters")
        if isinstance(node, dict):
            in_order = all(isinstance(key, str) for key in node) and list(node) == sorted(node)
            _require(
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
    _require_shape(shape, where)
    known = isinstance(name, bytes) and name.decode(errors="replace") in ITEMSIZE
    _require(known, where, name, f"a dtype among {', '.join(ITEMSIZE)}")
    paired = isinstance(parts, list) and isinstance(numbers, list) and len(parts) == len(numbers)
    _require(paired, where, [parts, numbers], "a list of parts and one of their data files")
    _require(
        all(type(n) is int and 0 <= n < shards for n in numbers),
        where,
        numbers,
        f"data files below {shards}",
    )
    boxes = [_parse_box(part, shape, where) for part in parts]
    _require(
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
        start, stop = 0 if start is None else start, size if stop is None else stop
        valid = type(start) is type(stop) is int and 0 <= start < stop <= size and step in (None, 1)
        _require(valid, where, [start, stop, step], f"[start, stop, None] within 0 and {size}")
        box.append((start, stop))
    return tuple(box)


def _require_disjoint(leaf: _Leaf, where: str) -> None:
    """The parts have as many elements as the leaf: if they leave none out, each lies in exactly
    one."""
    covered = np.zeros(leaf.shape, bool)
    for box in leaf.shard_of:
        covered[box_slices(box)] = True
    _require(bool(covered.all()), where, "parts that overlap", "parts that cover each element once")


def _read_shard(file: Path, shard: int, leaves: list[_Leaf], arrays: list[np.ndarray]) -> None:
    """Fill the arrays with what this data file holds, which must be what the index says it
    holds."""
    data = _unpack(_read_file(file), file)
    _require(
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
        _require(
            isinstance(chunks, list) and len(chunks) == len(boxes),
            where,
            chunks,
            f"{len(boxes)} parts",
        )
        for chunk in chunks:
            _require(isinstance(chunk, list) and len(chunk) == 2, where, chunk, "[pieces, slices]")
            box = _parse_box(_extension(chunk[1], SLICES, where), leaf.shape, where)
            _require(box in boxes, where, list(box), "a part that the index says is here, once")
            boxes.remove(box)
            values = _parse_pieces(chunk[0], leaf.dtype, box_size(box), where)
            array[box_slices(box)] = values.reshape([stop - start for start, stop in box])
    _require(not data, file, data, f"leaves with numbers below {len(leaves)}")


def _parse_pieces(pieces: Any, dtype: str, size: int, where: str) -> np.ndarray:
    """The ``size`` values of a part, stored flat in one or more pieces."""
    _require(isinstance(pieces, list), where, pieces, "a list of pieces")
    contents = []
    for piece in pieces:
        shape, name, content = _record(_extension(piece, NDARRAY, where), 3, where)
        _require(
            name == dtype.encode() and isinstance(content, bytes),
            where,
            [name, content],
            f"[{dtype}, bytes]",
        )
        n, rest = divmod(len(content), ITEMSIZE[dtype])
        _require(
            shape == [n] and rest == 0,
            where,
            f"shape {_SHORT.repr(shape)} of {len(content)} bytes",
            f"shape [{n}]",
        )
        contents.append(content)
    values, needed = b"".join(contents), size * ITEMSIZE[dtype]
    _require(len(values) == needed, where, f"{len(values)} bytes", f"{needed} bytes")
    return _decode(values, dtype)


def _read_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, file_size: int, where: str
) -> np.ndarray:
    """One array of an .npz. numpy's own reader would allocate what the header claims before it has
    the bytes."""
    usual = (
        info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        and info.compress_size <= file_size
    )
    # room for another entry, hidden by a damaged length
    whole = not info.comment and len(info.extra) < 46
    _require(
        usual and whole,
        where,
        info,
        f"at most {file_size} bytes, stored or deflated, without remarks",
    )
    with _reading(where, "an array"):
        stream = io.BytesIO(archive.read(info))
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran_order, dtype = readers[np.lib.format.read_magic(stream)](stream)
    name = "bfloat16" if dtype == np.dtype("V2") else dtype.name
    _require(name in ITEMSIZE, where, dtype, f"a dtype among {', '.join(ITEMSIZE)}")
    _require_shape(list(shape), where)
    values, needed = stream.read(), math.prod(shape) * ITEMSIZE[name]
    _require(
        len(values) == needed, where, f"{len(values)} bytes", f"{needed} bytes for shape {shape}"
    )
    array = _decode(values, name, dtype.byteorder).reshape(
        shape, order="F" if fortran_order else "C"
    )
    return np.asarray(array, order="C")


def _decode(content: bytes, name: str, byteorder: Any = "<") -> np.ndarray:
    """Flat values in a dtype of this machine. A bfloat16 is the upper half of a float32."""
    if name == "bfloat16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    stored = np.dtype("uint8" if name == "bool" else name).newbyteorder(byteorder)
    return np.frombuffer(content, stored).astype(name)


def box_size(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def box_slices(box: Box) -> tuple[Any, ...]:
    """An index that gives a view, of an array without axes too."""
    return (*(slice(*axis) for axis in box), ...)


def _file_size(file: Path) -> int:
    with _reading(file, "a file"):
        # nor a pipe or a device, which may never end
        _require(file.is_file(), file, "no such file", "a file")
        return file.stat().st_size


def _read_file(file: Path) -> bytes:
    _file_size(file)
    with _reading(file, "a file"):
        return file.read_bytes()


def _unpack(data: bytes, where: object, raw: bool = False) -> Any:
    msgpack = msgpack_module()
    with _reading(where, "msgpack"):
        return msgpack.unpackb(data, raw=raw, max_array_len=MAX_ITEMS)


def _extension(value: Any, code: int, where: str) -> bytes:
    _require(
        isinstance(value, msgpack_module().ExtType) and value.code == code,
        where,
        value,
        f"msgpack extension {code}",
    )
    return value.data


def _record(data: Any, length: int, where: str) -> list[Any]:
    """A list of so many fields, packed inside another."""
    _require(isinstance(data, bytes), where, data, "packed bytes")
    fields = _unpack(data, where, raw=True)
    _require(isinstance(fields, list) and len(fields) == length, where, fields, f"{length} fields")
    return fields


def _require_shape(shape: Any, where: str) -> None:
    valid = (
        isinstance(shape, list)
        and len(shape) <= MAX_AXES
        and all(type(n) is int and 0 < n < 1 << 63 for n in shape)
    )
    _require(valid, where, shape, f"at most {MAX_AXES} positive sizes")


def _require(ok: bool, where: object, found: object, expected: str) -> None:
    if not ok:
        raise CheckpointError(f"{where}: found {_SHORT.repr(found)}, expected {expected}")


@contextmanager
def _reading(where: object, what: str) -> Iterator[None]:
    """Whatever zipfile, numpy, msgpack or the file system raises on a broken file becomes a
    CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{where}: found {type(error).__name__} ({error}), expected {what}"
        ) from error


class _Short(reprlib.Repr):
    """repr for messages, short whatever a file holds."""

    def repr_str(self, value: str, level: int) -> str:
        return value if len(value) <= 200 else f"text of {len(value)} characters"

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value) if len(value) <= 40 else f"{len(value)} bytes"

    def repr_ExtType(self, value: Any, level: int) -> str:
        return f"msgpack extension {value.code} of {len(value.data)} bytes"


_SHORT = _Short()
_SHORT.maxlevel = 2
