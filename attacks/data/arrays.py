"""Images in the arrays of an .npz file, which are read from the disk as they are needed."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ironmoe.attacks.data.errors import DataError, UnreadableImage
from ironmoe.attacks.data.image_set import LARGEST_LABEL, Item, digest

LARGEST_CHECKED = 1_000_000_000  # bytes
"""An array on the disk of up to this size is read once, to compare it with its checksum."""

READ_AT_ONCE = 1 << 20  # bytes
LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a member of a zip file: 26 bytes, and the lengths of its name and of what else is there."""


class MappedArray(NamedTuple):
    """An array in a file, from ``offset`` bytes on, that is opened where it is read: sent to
    another process, it would be read as a whole."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    def open(self) -> np.ndarray:
        order: Literal["F", "C"] = "F" if self.fortran else "C"
        return np.memmap(
            self.path, self.dtype, "r", offset=self.offset, shape=self.shape, order=order
        )


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
        self,
        name: str,
        images: np.ndarray | MappedArray,
        labels: np.ndarray,
        *,
        fingerprint: str,
        origin: str,
    ) -> None:
        self.name = name
        self.origin = origin
        self.fingerprint = fingerprint
        self.notes = []
        self._mapped = images if isinstance(images, MappedArray) else None
        labels = _whole(labels)
        opened = images.open() if isinstance(images, MappedArray) else images
        _check(opened, labels, origin)
        self.images = _channels_first(opened, origin)
        self.names: list[str] | None = None
        if labels.dtype.kind == "U":
            classes, labels = np.unique(labels, return_inverse=True)
            self.names = [str(name) for name in classes]
        self.labels = torch.from_numpy(labels.astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "images": self.images if self._mapped is None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._mapped is not None:
            self.images = _channels_first(self._mapped.open(), self.origin)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, number: int, channels: int) -> Item:
        """The array itself, which is not decoded; grey ones are repeated where RGB is asked for."""
        pixels = as_pixels(self.images[number], channels, self.where(number))
        return Item(pixels, int(self.labels[number]))

    def where(self, number: int) -> str:
        return f"image {number} in {self.origin}"


def as_pixels(values: np.ndarray, channels: int, where: str) -> Tensor:
    """(C, H, W) uint8 or float32 of an array (C, H, W) that needs no decoding; a grey one is
    repeated where RGB is asked for.

    Raises:
        UnreadableImage: floats that are not in [0, 1].
        DataError: it has neither 1 nor ``channels`` channels.
    """
    if values.dtype != np.uint8:
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise UnreadableImage(f"{where} must be finite, got NaN or infinity")
        if values.min() < 0 or values.max() > 1:
            raise UnreadableImage(
                f"{where} must be floats in [0, 1], got values from "
                f"{values.min():.6g} to {values.max():.6g}; {_instead(values)}"
            )
    if values.shape[0] == 1 and channels == 3:
        values = values.repeat(3, axis=0)
    if values.shape[0] != channels:
        raise DataError(
            f"{where} must have {channels} channels for this model, got {values.shape[0]}"
        )
    return torch.from_numpy(np.array(values, order="C"))  # a copy, off the file


def _instead(values: np.ndarray) -> str:
    """What to do about values outside of [0, 1]."""
    if values.min() >= 0 and values.max() <= 255:
        return "if they are of 0 … 255, divide them by 255 or give uint8"
    return "if they are normalised, give them as they were before: mean and std are the model's"


def image_arrays(path: Path | str) -> ImageArrays:
    """The arrays ``images`` and ``labels`` of an .npz file.

    The images of a file that ``np.savez`` wrote stay on the disk until they are read; those of a
    compressed file are held in memory, in their own dtype. What is read here is compared with the
    checksums of the file; of images on the disk only those of up to a gigabyte are.

    Raises:
        DataError: no such file, or other arrays.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            lines = [(member.filename, member.CRC) for member in archive.infolist()]
        with np.load(path, allow_pickle=False) as file:
            missing = {"images", "labels"} - set(file.files)
            if missing:
                raise DataError(f"{path} must hold arrays 'images' and 'labels', got {file.files}")
            labels = file["labels"]
            images = _mapped(path, "images.npy") or file["images"]
    except DataError:
        raise
    except zipfile.BadZipFile as error:
        damaged = f"{path} is damaged" if "CRC" in str(error) else None
        what = damaged or f"{path} must be an .npz file, which np.savez writes"
        raise DataError(f"{what}: {error}") from error
    except (ValueError, OSError, EOFError, KeyError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error

    return ImageArrays(path.stem, images, labels, fingerprint=digest(lines), origin=str(path))


def _mapped(path: Path, member: str) -> MappedArray | None:
    """An array of an .npz file that is not compressed; None if it is."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        if info.file_size <= LARGEST_CHECKED:
            with archive.open(info) as held:
                while held.read(READ_AT_ONCE):  # its end compares the checksum
                    pass

    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_length, more = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        file.seek(name_length + more, os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0  # version 3 differs in the names of fields
        )
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject or 0 in shape:
            return None
        return MappedArray(path, file.tell(), shape, dtype, fortran)


def _whole(labels: np.ndarray) -> np.ndarray:
    """Whole numbers that were saved as floats, as integers; other labels as they are."""
    if labels.dtype.kind != "f" or not np.isfinite(labels).all() or (labels % 1).any():
        return labels
    return labels.astype(np.int64)


def _check(images: np.ndarray, labels: np.ndarray, origin: str) -> None:
    """DataError: arrays that are no images with labels."""
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise DataError(
            f"labels in {origin} must be one axis of whole numbers or strings, got {labels.dtype} "
            f"of shape {labels.shape}"
        )
    if len(images) != len(labels) or len(labels) == 0:
        raise DataError(
            f"{origin} must hold as many images as labels, and some, got {len(images)} and "
            f"{len(labels)}"
        )
    if labels.dtype.kind in "iu" and int(labels.min()) < 0:
        raise DataError(f"labels in {origin} must be at least 0, got {int(labels.min())}")
    if labels.dtype.kind in "iu" and int(labels.max()) > LARGEST_LABEL:
        raise DataError(f"labels in {origin} must be below 2**63, got {int(labels.max())}")
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
    if 0 in images.shape:
        raise DataError(f"images in {origin} must have at least one pixel, got {images.shape}")
    return images
