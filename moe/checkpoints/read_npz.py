"""The dense ViT's .npz of the official JAX code, read into numpy arrays.

Sizes in a file are claims: nothing is allocated before they agree with the bytes at hand, and
nothing is unpickled. An .npz has checksums, so a changed bit is noticed.
"""

import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

from ironmoe.moe.checkpoints.arrays import ITEMSIZE, decode, file_size, require_shape
from ironmoe.moe.checkpoints.errors import reading, require
from ironmoe.moe.checkpoints.stored_array import StoredArray
from ironmoe.moe.checkpoints.vmoe_format import Box, box_slices


def read_npz_checkpoint(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a dense ViT's .npz of the official vision_transformer repository.

    Returns names such as "Transformer/encoderblock_0/LayerNorm_0/scale" to arrays in their stored
    shape and dtype; bfloat16, which numpy stores as two opaque bytes, becomes float32, exactly.
    Where names begin with "opt/target/" or "params/", only these entries are read, without that
    prefix (the others are an optimizer's state).

    CheckpointError: the file is missing, truncated, corrupt or foreign, or holds Python objects.
    """
    file = Path(path)
    with _opened(file) as (archive, members):
        return {
            name: _read_member(archive, info, file_size(file), f"{file}: leaf {name}")
            for name, info in members.items()
        }


def open_npz_checkpoint(path: str | os.PathLike[str]) -> dict[str, StoredArray]:
    """What ``read_npz_checkpoint`` reads, as arrays that are read where they are indexed, so that
    one of them is held at a time. An array is read whole, because the archive may be compressed,
    and has a checksum for each array.

    CheckpointError: as ``read_npz_checkpoint``. What is wrong with the values of an array is found
    when it is read.
    """
    file = Path(path)
    size = file_size(file)

    def reader(name: str, where: str) -> Callable[[Box, np.ndarray], None]:
        def read(box: Box, out: np.ndarray) -> None:
            with _opened(file) as (archive, members):
                whole = _read_member(archive, members[name], size, where)
                out[...] = whole[box_slices(box)]

        return read

    with _opened(file) as (archive, members):
        arrays = {}
        for name, info in members.items():
            where = f"{file}: leaf {name}"
            with _member(archive, info, size, where) as (_, header):
                arrays[name] = StoredArray(header.shape, header.dtype, reader(name, where))
        return arrays


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    byteorder: str
    order: Literal["F", "C"]


@contextmanager
def _opened(file: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """The archive, and its entries that are weights by their names."""
    file_size(file)
    with reading(file, "an .npz archive"), zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        require(len(members) > 0, file, "an empty archive", "arrays")

        for root in ("opt/target/", "params/"):
            members = {
                n.removeprefix(root): info for n, info in members.items() if n.startswith(root)
            } or members
        yield archive, members


@contextmanager
def _member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, archive_size: int, where: str
) -> Iterator[tuple[IO[bytes], _Header]]:
    """The values of one array of an .npz as a stream, and what they are. This is not left to
    numpy's reader, which allocates what the header claims before it has the bytes."""
    usual = (
        info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        and info.compress_size <= archive_size
    )
    # remarks may be another entry, which a damaged length has hidden
    whole = not info.comment and len(info.extra) < 46
    require(
        usual and whole,
        where,
        info,
        f"at most {archive_size} bytes, stored or deflated, without remarks",
    )

    with reading(where, "an array"), archive.open(info) as stream:
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran_order, dtype = readers[np.lib.format.read_magic(stream)](stream)

        # numpy stores a bfloat16 as two opaque bytes
        name = "bfloat16" if dtype == np.dtype("V2") else dtype.name
        require(name in ITEMSIZE, where, dtype, f"a dtype among {', '.join(ITEMSIZE)}")
        require_shape(list(shape), where)
        yield stream, _Header(shape, name, dtype.byteorder, "F" if fortran_order else "C")


def _read_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, archive_size: int, where: str
) -> np.ndarray:
    """One array of an .npz."""
    with _member(archive, info, archive_size, where) as (stream, header):
        values = stream.read()
    needed = math.prod(header.shape) * ITEMSIZE[header.dtype]
    words = f"{needed} bytes for shape {header.shape}"
    require(len(values) == needed, where, f"{len(values)} bytes", words)
    flat = decode(values, header.dtype, header.byteorder)
    return np.asarray(flat.reshape(header.shape, order=header.order), order="C")
