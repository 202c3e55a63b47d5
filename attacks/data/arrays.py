"""Images in the arrays of an .npz file, which are read from the disk as they are needed."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import torch

from ironmoe.attacks.data.errors import DataError, UnreadableImage
from ironmoe.attacks.data.image_set import Item, digest

LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a member of a zip file: 26 bytes, and the lengths of its name and of what else is there."""


class ImageArrays:
    """Images (N, S, S), (N, H, W, 1 or 3) or (N, 1 or 3, H, W), uint8 or floats in [0, 1], with
    labels (N,).

    Args:
        name: of the set.
        images, labels: as above; whole numbers are indices of the logits, strings are names.
        fingerprint: a short text that other arrays do not have.
        origin: how errors call it.

    Raises:
        DataError: arrays of another kind, or of different lengths.
    """

    notes: list[str]

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray, *, fingerprint: str, origin: str
    ) -> None:
        self.name = name
        self.origin = origin
        self.fingerprint = fingerprint
        self.notes = []
        _check(images, labels, origin)
        self.images = _channels_first(images, origin)
        self.names: list[str] | None = None
        if labels.dtype.kind == "U":
            classes, labels = np.unique(labels, return_inverse=True)
            self.names = [str(name) for name in classes]
        self.labels = torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, number: int, channels: int) -> Item:
        """The array itself, which is not decoded; grey ones are repeated where RGB is asked for."""
        values = np.array(self.images[number])  # a copy, off the file
        if values.dtype != np.uint8:
            values = values.astype(np.float32)
            if not np.isfinite(values).all():
                raise UnreadableImage(f"{self.where(number)} must be finite, got NaN or infinity")
            if values.min() < 0 or values.max() > 1:
                raise DataError(
                    f"{self.where(number)} must be floats in [0, 1], got values from "
                    f"{values.min():.6g} to {values.max():.6g}"
                )
        if values.shape[0] == 1 and channels == 3:
            values = values.repeat(3, axis=0)
        if values.shape[0] != channels:
            raise DataError(
                f"images in {self.origin} must have {channels} channels for this model, got "
                f"{values.shape[0]}"
            )
        return Item(torch.from_numpy(values), int(self.labels[number]))

    def where(self, number: int) -> str:
        return f"image {number} in {self.origin}"


def image_arrays(path: Path | str) -> ImageArrays:
    """The arrays ``images`` and ``labels`` of an .npz file.

    The images of a file that ``np.savez`` wrote stay on the disk until they are read; those of a
    compressed file are held in memory, in their own dtype.

    Raises:
        DataError: no such file, or other arrays.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"images", "labels"} - set(file.files)
            if missing:
                raise DataError(f"{path} must hold arrays 'images' and 'labels', got {file.files}")
            labels = file["labels"]
            mapped = _mapped(path, "images.npy")
            images = file["images"] if mapped is None else mapped
        with zipfile.ZipFile(path) as archive:
            lines = [(member.filename, member.CRC) for member in archive.infolist()]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as .npz: {error}") from error

    return ImageArrays(path.stem, images, labels, fingerprint=digest(lines), origin=str(path))


def _mapped(path: Path, member: str) -> np.ndarray | None:
    """An array of an .npz file that is not compressed, on the disk; None if it is."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    if info.compress_type != zipfile.ZIP_STORED:
        return None

    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_length, more = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        file.seek(name_length + more, 1)
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject or not np.prod(shape):
            return None
        start = file.tell()
    return np.memmap(
        path, dtype=dtype, mode="r", offset=start, shape=shape, order="F" if fortran else "C"
    )


def _check(images: np.ndarray, labels: np.ndarray, origin: str) -> None:
    """DataError: arrays that are no images with labels."""
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise DataError(
            f"labels in {origin} must be one axis of integers or strings, got {labels.dtype} of "
            f"shape {labels.shape}"
        )
    if len(images) != len(labels) or len(labels) == 0:
        raise DataError(
            f"{origin} must hold as many images as labels, and some, got {len(images)} and "
            f"{len(labels)}"
        )
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise DataError(f"images in {origin} must be uint8 or floats in [0, 1], got {images.dtype}")


def _channels_first(images: np.ndarray, origin: str) -> np.ndarray:
    """(N, C, H, W), as a view."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"images in {origin} must have 1 or 3 channels, got shape {images.shape}")
    if images.size == 0:
        raise DataError(f"images in {origin} must have at least one pixel, got {images.shape}")
    return images
