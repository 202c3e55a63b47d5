"""An .npz file of some columns and many images, written image by image."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ironmoe.bench.common.files import open_atomically


def write_npz(
    path: Path, columns: Mapping[str, NDArray[Any]], images: Iterator[Tensor], count: int
) -> None:
    """Write the bytes that ``numpy.savez(path, **columns, images=…)`` writes. No more than an image
    is in memory, and the file is there whole or not at all.

    Args:
        columns: name → array.
        images: of one shape and dtype, on the CPU; the file has them as (M, …), and without any as
            (0,) float32.
        count: how many images there are, M.

    Raises:
        ValueError: images of several shapes or dtypes, or another number of them.
    """
    with open_atomically(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, column in columns.items():  # a member that is opened has a fixed date
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, column)
        with archive.open("images.npy", "w", force_zip64=True) as member:
            _write_images(cast(BinaryIO, member), images, count)


def _write_images(file: BinaryIO, images: Iterator[Tensor], count: int) -> None:
    """The array of all images, as .npy has it: a header that says how many there are, then their
    bytes."""
    form: tuple[tuple[int, ...], np.dtype[Any]] = ((), np.dtype(np.float32))
    written = 0
    for image in images:
        array = np.ascontiguousarray(image.numpy())
        if not written:
            form = (array.shape, array.dtype)
            _write_header(file, (count, *array.shape), array.dtype)
        if (array.shape, array.dtype) != form:
            raise ValueError(
                f"images must all have shape {form[0]} and dtype {form[1]}, got {array.shape} and "
                f"{array.dtype}"
            )
        file.write(array.data)
        written += 1

    if written != count:
        raise ValueError(f"images must be as many as rows, {count}, got {written}")
    if not written:
        _write_header(file, (0,), form[1])


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    described = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": described, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
