"""The dense ViT's .npz of the official JAX code, read into numpy arrays.

Sizes in a file are claims: nothing is allocated before they agree with the bytes at hand, and
nothing is unpickled. An .npz has checksums, so a changed bit is noticed.
"""

import io
import math
import os
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np

from ironmoe.moe.checkpoints.arrays import ITEMSIZE, decode, file_size, require_shape
from ironmoe.moe.checkpoints.errors import reading, require


def read_npz_checkpoint(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a dense ViT's .npz of the official vision_transformer repository.

    Returns names such as "Transformer/encoderblock_0/LayerNorm_0/scale" to arrays in their stored
    shape and dtype; bfloat16, which numpy stores as two opaque bytes, becomes float32, exactly.
    Where names begin with "opt/target/" or "params/", only these entries are read, without that
    prefix (the others are an optimizer's state).

    CheckpointError: the file is missing, truncated, corrupt or foreign, or holds Python objects.
    """
    size = file_size(file := Path(path))
    with reading(file, "an .npz archive"), zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        require(len(members) > 0, file, "an empty archive", "arrays")

        for root in ("opt/target/", "params/"):
            members = {
                n.removeprefix(root): info for n, info in members.items() if n.startswith(root)
            } or members

        return {
            name: _read_member(archive, info, size, f"{file}: leaf {name}")
            for name, info in members.items()
        }


def _read_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, archive_size: int, where: str
) -> np.ndarray:
    """One array of an .npz. This is not left to numpy's reader, which allocates what the header
    claims before it has the bytes."""
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

    with reading(where, "an array"):
        stream = io.BytesIO(archive.read(info))
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran_order, dtype = readers[np.lib.format.read_magic(stream)](stream)

    # numpy stores a bfloat16 as two opaque bytes
    name = "bfloat16" if dtype == np.dtype("V2") else dtype.name
    require(name in ITEMSIZE, where, dtype, f"a dtype among {', '.join(ITEMSIZE)}")
    require_shape(list(shape), where)

    values = stream.read()
    needed = math.prod(shape) * ITEMSIZE[name]
    require(
        len(values) == needed, where, f"{len(values)} bytes", f"{needed} bytes for shape {shape}"
    )
    order: Literal["F", "C"] = "F" if fortran_order else "C"
    array = decode(values, name, dtype.byteorder).reshape(shape, order=order)
    return np.asarray(array, order="C")
