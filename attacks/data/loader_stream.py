"""Batches of a user's DataLoader, or of any iterable, as what ``evaluate`` takes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from ironmoe.attacks.data.arrays import ImageArrays
from ironmoe.attacks.data.errors import DataError
from ironmoe.attacks.data.huggingface import SavedImages
from ironmoe.attacks.data.image_set import LARGEST_LABEL, ImageSet, digest
from ironmoe.attacks.data.stream import READ_TOGETHER, ImageStream
from ironmoe.attacks.data.torch_datasets import TorchImages, as_array, names_of, one_line, parts

ARRAYS = (Tensor, np.ndarray)
RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class LoaderStream:
    """The batches of a loader, in its order, as (images (n, C, H, W) float32 in [0, 1], labels (n,)
    int64) on CPU. ``evaluate`` takes it as its data; under several processes each one goes through
    the whole loader.

    Args:
        batches: a DataLoader, or what gives the same batches each time that it is gone through:
            (images, labels), or mappings with these keys. Images (n, H, W), (n, C, H, W) or
            (n, H, W, C), uint8 or floats in [0, 1]; labels n whole numbers.
        channels: 3: grey images are repeated; None: they are taken as they are.
        length: how many images there are, where the loader does not know it.
        name: for reports and errors.

    Attributes:
        length: as above, or what the loader says; None: nobody knows.
        names: of the classes, by label, where a DataLoader's data set has them and its labels come
            as they are; None: labels are indices of the logits.
        notes: what people should know.

    Raises:
        DataError: the loader shuffles, or shares its images out over processes. While reading: a
            batch of another form, or one that cannot be read.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        channels: int | None = None,
        length: int | None = None,
        name: str = "loader",
    ) -> None:
        if isinstance(batches, IterableDataset):  # it gives one image at a time
            batches = DataLoader(batches, batch_size=READ_TOGETHER)
        self.batches = batches
        self.channels = channels
        self.name = name
        self.notes: list[str] = []
        self.names: list[str] | None = None
        self.length = length
        self._begun = False
        if isinstance(batches, DataLoader):
            check_order(batches, name)
            self.length = _length(batches) if length is None else length
            self.notes += _left_out(batches)
            self._take_names(batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self._iterator()
        number = 0
        while True:
            where = f"batch {number} of {self.name}"
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                raise DataError(f"{where} cannot be read: {one_line(error)}") from error
            yield self._checked(batch, where)
            number += 1

    def _take_names(self, loader: DataLoader[Any]) -> None:
        """Those of its data set; where it collates in a way of its own, labels may be others."""
        if loader.collate_fn is default_collate:
            self.names = names_of(loader.dataset)
        elif any(hasattr(loader.dataset, name) for name in ("classes", "class_to_idx")):
            self.notes.append(
                "The loader collates in a way of its own, so its labels were taken as indices of "
                "the logits, whatever names its data set has."
            )

    def _iterator(self) -> Iterator[Any]:
        batches = iter(self.batches)
        if self._begun and batches is self.batches:
            raise DataError(
                f"{self.name} must give its batches again, got an iterator that can be gone "
                "through once: give what makes it"
            )
        self._begun = True
        return batches

    def _checked(self, batch: Any, where: str) -> tuple[Tensor, Tensor]:
        """A batch in the form that is promised."""
        images, labels = parts(batch, where)
        numbers = _labels(labels, where)
        pixels = torch.from_numpy(np.array(as_array(images, where), order="C"))
        if pixels.ndim == 3:
            pixels = pixels[:, None]
        elif pixels.ndim == 4 and pixels.shape[1] not in (1, 3):
            pixels = pixels.permute(0, 3, 1, 2)
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or len(pixels) != len(numbers):
            raise DataError(
                f"{where} must be images (n, 1 or 3, H, W) with n labels, got shapes "
                f"{tuple(images.shape)} and {tuple(numbers.shape)}"
            )

        pixels = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels.float()
        if self.channels == 3:
            pixels = pixels.expand(-1, 3, -1, -1)
        if self.channels not in (None, pixels.shape[1]):
            raise DataError(
                f"{where} must have {self.channels} channels for this model, got {pixels.shape[1]}"
            )
        return pixels.contiguous(), numbers


def images_of(given: Any, *, name: str | None = None) -> ImageSet | ImageStream | LoaderStream:
    """Whatever a user's function gives, as a set of images or as a stream of their batches.

    Args:
        given: a set or a stream of this package; a ``datasets.Dataset``; a map-style or iterable
            data set of torch; a DataLoader; (images, labels) as tensors or arrays; or batches. A
            list has items, or batches, which are told by their images (n, C, H, W).
        name: for reports; by default that of its class.

    Raises:
        DataError: it is nothing of these.
    """
    called = name or type(given).__name__
    if isinstance(given, ImageStream | LoaderStream) or _is_set(given):
        return given
    if type(given).__module__.partition(".")[0] == "datasets":
        if isinstance(given, dict) or not hasattr(given, "__len__"):
            raise DataError(
                f"{called} must be one datasets.Dataset, as a split of it, got "
                f"{type(given).__name__}"
            )
        return SavedImages(given, name=called)
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(p, Tensor) for p in given):
        return TorchImages(TensorDataset(*given), name=called)
    if isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], ARRAYS):
        return _arrays(given[0], given[1], called)
    if isinstance(given, DataLoader | IterableDataset) or _are_batches(given):
        return LoaderStream(given, name=called)
    if not isinstance(given, str | bytes | dict | Tensor):
        if hasattr(given, "__len__") and hasattr(given, "__getitem__"):
            return TorchImages(given, name=called)
        if isinstance(given, Iterable):
            return LoaderStream(given, name=called)
    raise DataError(
        f"data must be a data set or a DataLoader of torch, a datasets.Dataset, (images, labels) "
        f"or batches, got {type(given).__name__}"
    )


def _is_set(given: Any) -> bool:
    return all(hasattr(given, name) for name in ("read", "where", "fingerprint", "notes"))


def _are_batches(given: Any) -> bool:
    """Whether it is a list of batches: their images have an axis more than one image."""
    if not isinstance(given, tuple | list) or not given:
        return False
    first = given[0]
    held = first.values() if isinstance(first, Mapping) else first
    return isinstance(held, Iterable) and any(
        isinstance(values, ARRAYS) and values.ndim == 4 for values in held
    )


def _arrays(images: Tensor | np.ndarray, labels: Any, name: str) -> ImageArrays:
    """A set of (images, labels), of which one at least is no tensor."""
    try:
        pixels, numbers = _on_cpu(images), _on_cpu(labels)
        held = [np.ascontiguousarray(each).view(np.uint8) for each in (pixels, numbers)]
    except (ValueError, TypeError) as error:
        raise DataError(f"{name} must be arrays of images and labels: {error}") from error
    about = (name, pixels.shape, pixels.dtype, numbers.shape, numbers.dtype)
    sums = [zlib.crc32(each.data) for each in held]
    return ImageArrays(name, pixels, numbers, fingerprint=digest([about, sums]), origin=name)


def _on_cpu(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
    return np.asarray(values)


def _labels(labels: Any, where: str) -> Tensor:
    """(n,) int64."""
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(
            f"labels of {where} must be one whole number for each image, got shape "
            f"{values.shape}: of one-hot labels give the place of the 1, and of single images "
            "batches"
        )
    if values.dtype.kind not in "iu" or (values.size and int(values.min()) < 0):
        got = values.dtype if values.dtype.kind not in "iu" else int(values.min())
        raise DataError(f"labels of {where} must be whole numbers of at least 0, got {got}")
    if values.size and int(values.max()) > LARGEST_LABEL:
        raise DataError(f"labels of {where} must be below 2**63, got {int(values.max())}")
    return torch.from_numpy(values.astype(np.int64))


def check_order(loader: DataLoader[Any], name: str) -> None:
    """DataError: a loader whose order is another one each time, or in each process."""
    batch_sampler = loader.batch_sampler
    samplers = [loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    for sampler in samplers:
        if isinstance(sampler, DistributedSampler):
            raise DataError(
                f"{name} must give all images in each process, got a DistributedSampler: evaluate "
                "shares them out itself"
            )
        if isinstance(sampler, RANDOM):
            raise DataError(
                f"{name} must give its images in the same order each time, got a "
                f"{type(sampler).__name__}: make the DataLoader with shuffle=False"
            )


def _length(loader: DataLoader[Any]) -> int | None:
    """How many images the loader gives, if it says so."""
    batches = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset) or type(batches) is not BatchSampler:
        return None
    count = len(batches.sampler)  # type: ignore[arg-type]
    return count - count % batches.batch_size if batches.drop_last else count


def _left_out(loader: DataLoader[Any]) -> list[str]:
    """A sentence about the images of an incomplete last batch."""
    kept = _length(loader)
    if kept is None:
        return []
    rest = len(loader.batch_sampler.sampler) - kept  # type: ignore[union-attr]
    return [f"{rest} images are left out, because the loader has drop_last=True."] * (rest > 0)
