"""A map-style ``torch.utils.data.Dataset`` as a set of images, whatever form its items have."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from ironmoe.attacks.data.arrays import as_pixels
from ironmoe.attacks.data.columns import IMAGE_NAMES, LABEL_NAMES
from ironmoe.attacks.data.decoding import as_picture
from ironmoe.attacks.data.errors import DataError, UnreadableImage, without_addresses
from ironmoe.attacks.data.image_set import LARGEST_LABEL, Item, digest

READ_TWICE = 4
"""Of the images that a process reads, so many are read again: a random transform shows."""

DAMAGED = (OSError, EOFError, SyntaxError, ValueError, RuntimeError)
"""What readers of files raise at one of them. Any other error is one of the data set's code."""

NOT_NORMALISED = (
    "leave Normalize out of its transform, and give mean and std to the model, which computes "
    "(pixels − mean) / std itself"
)


class TorchImages:
    """The items of a data set, in its order: (image, label), or a mapping with such keys as "image"
    and "label".

    An image is a Pillow image, or uint8 or floats in [0, 1] as a tensor or array (H, W), (C, H, W)
    or (H, W, C). Pillow images and uint8 are resized and cropped as the model wants it; floats are
    taken as they are. No image is turned by its EXIF orientation: that is up to the data set.
    Labels are whole numbers. Those in ``targets`` or ``labels`` are known without reading, names
    come from ``class_to_idx`` or ``classes``; neither counts where a ``target_transform`` changes
    labels.

    Args:
        dataset: with ``__len__`` and ``__getitem__``. Workers get a copy of it.
        name: of the set; by default that of its class.

    Raises:
        DataError: it has no length, no items, or parts with different classes. While reading: an
            item of another form, or one that is another one each time.
    """

    def __init__(self, dataset: Dataset[Any] | Sequence[Any], *, name: str | None = None) -> None:
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            raise DataError(
                "dataset must have a length and items by number, got "
                f"{type(dataset).__name__}: give a DataLoader of it"
            )
        self.dataset = dataset
        self.name = name or type(dataset).__name__
        self.notes: list[str] = []
        if not len(self):
            raise DataError(f"{self.name} must hold images, got none")

        self.names = names_of(dataset)
        self.labels = _labels(dataset)
        known = [] if self.labels is None else self.labels.tolist()
        self.fingerprint = digest([(self.name, len(self), self.names), known, *_content(dataset)])
        self._read_twice: tuple[int, int] = (-1, 0)  # (process, how many images)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, number: int, channels: int) -> Item:
        item = self._item(number, channels)
        process, count = self._read_twice
        count = count if process == os.getpid() else 0
        if count < READ_TWICE:
            self._read_twice = (os.getpid(), count + 1)
            again = self._item(number, channels)
            if item.label != again.label or not _same(item.image, again.image):
                raise DataError(
                    f"{self.where(number)} must be the same each time it is read, got two "
                    "different ones: leave random transforms out"
                )
        return item

    def where(self, number: int) -> str:
        return f"item {number} of {self.name}"

    def _item(self, number: int, channels: int) -> Item:
        where = self.where(number)
        try:
            image, label = parts(self.dataset[number], where)
            label = self._checked(whole_number(label, where), number)
            if hasattr(image, "getexif"):  # of Pillow, which may read its file only now
                return Item(as_picture(image, channels, of_file=False), label)
        except DataError:
            raise
        except DAMAGED as error:
            raise UnreadableImage(f"{where} cannot be read: {one_line(error)}") from error
        except Exception as error:
            raise DataError(f"{where} must be readable, got {one_line(error)}") from error

        values = channels_first(as_array(image, where), where)
        return Item(as_pixels(values, channels, where), label)

    def _checked(self, label: int, number: int) -> int:
        if self.names is not None and label >= len(self.names):
            raise DataError(
                f"labels must be below the number of classes, {len(self.names)}, got {label} of "
                f"{self.where(number)}"
            )
        if self.labels is not None and label != int(self.labels[number]):
            raise DataError(
                f"labels must be those that the data set names for all images, got {label} of "
                f"{self.where(number)} in place of {int(self.labels[number])}"
            )
        return label


def parts(item: Any, where: str) -> tuple[Any, Any]:
    """(image, label) of an item, or (images, labels) of a batch.

    Raises:
        DataError: it is neither a pair nor a mapping with one key for each.
    """
    if isinstance(item, Mapping):
        images = [key for key in IMAGE_NAMES if key in item or f"{key}s" in item]
        labels = [key for key in LABEL_NAMES if key in item]
        if len(images) == 1 and len(labels) == 1:
            key = images[0] if images[0] in item else f"{images[0]}s"
            return item[key], item[labels[0]]
        raise DataError(
            f"{where} must have one key of {', '.join(IMAGE_NAMES)} and one of "
            f"{', '.join(LABEL_NAMES)}, got {', '.join(map(str, item))}"
        )
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    got = f"{type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
    raise DataError(f"{where} must be (image, label), or a mapping with these keys, got a {got}")


def whole_number(label: Any, where: str) -> int:
    """A label of any type as a number.

    Raises:
        DataError: it is a name, a share, or several numbers, as a one-hot label is.
    """
    values = label.detach().cpu().numpy() if isinstance(label, Tensor) else np.asarray(label)
    if values.size != 1:
        raise DataError(
            f"the label of {where} must be one whole number, got shape {values.shape}: of a "
            "one-hot label give the place of the 1"
        )
    is_whole = values.dtype.kind in "iu" or (values.dtype.kind == "f" and values.item() % 1 == 0)
    if not is_whole or not 0 <= int(values.item()) <= LARGEST_LABEL:
        limit = "" if not is_whole or values.item() < 0 else " and below 2**63"
        raise DataError(
            f"the label of {where} must be a whole number of at least 0{limit}, got "
            f"{values.item()!r}"
        )
    return int(values.item())


def as_array(image: Any, where: str) -> np.ndarray:
    """uint8, or finite float32 in [0, 1], of a tensor or an array.

    Raises:
        UnreadableImage: NaN or infinity.
        DataError: another type, or another range, which all images will have.
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        values = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    elif isinstance(image, np.ndarray):
        values = image
    else:
        raise DataError(
            f"{where} must be a Pillow image, a tensor or an array, got {type(image).__name__}"
        )

    if values.dtype == np.uint8:
        return values
    if values.dtype.kind != "f":
        raise DataError(f"{where} must be uint8 or floats in [0, 1], got {values.dtype}")
    values = values.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise UnreadableImage(f"{where} must be finite, got NaN or infinity")
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if low < 0:
        raise DataError(
            f"{where} must be floats in [0, 1], got values from {low:.6g} to {high:.6g}, as after "
            f"normalisation: {NOT_NORMALISED}"
        )
    if high > 1:
        raise DataError(
            f"{where} must be floats in [0, 1], got values from {low:.6g} to {high:.6g}: divide by "
            f"255; or, if they were normalised, {NOT_NORMALISED}"
        )
    return values


def channels_first(values: np.ndarray, where: str) -> np.ndarray:
    """(C, H, W), of one or three channels, as a view."""
    if values.ndim == 2:
        values = values[None]
    elif values.ndim == 3 and values.shape[0] not in (1, 3):
        values = values.transpose(2, 0, 1)
    if values.ndim != 3 or values.shape[0] not in (1, 3) or values.size == 0:
        raise DataError(f"{where} must have 1 or 3 channels and some pixels, got {values.shape}")
    return values


def one_line(error: BaseException) -> str:
    """An error on one line: its kind and what it says in the end, without tracebacks."""
    kind = type(error).__name__
    text = without_addresses(str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[-1] if lines else ""
    return said if said.startswith(f"{kind}: ") else f"{kind}: {said}" if said else kind


def _same(one: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other), equal_nan=False)


def _labels(dataset: Any) -> Tensor | None:
    """(N,) int64, where the data set knows them without reading images."""
    if isinstance(dataset, Subset):
        labels = _labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        known = [_labels(part) for part in dataset.datasets]
        labels_of_all = [labels for labels in known if labels is not None]
        return torch.cat(labels_of_all) if len(labels_of_all) == len(known) else None
    if isinstance(dataset, TensorDataset):
        return _whole(dataset.tensors[1], len(dataset)) if len(dataset.tensors) == 2 else None

    if getattr(dataset, "target_transform", None) is not None:
        return None
    found = (_whole(getattr(dataset, name, None), len(dataset)) for name in ("targets", "labels"))
    return next((labels for labels in found if labels is not None), None)


def _whole(values: Any, count: int) -> Tensor | None:
    """int64 (count,), if that is what the values are."""
    if not isinstance(values, Tensor | np.ndarray | list | tuple) or len(values) != count:
        return None
    try:
        labels = torch.as_tensor(values)
    except (ValueError, TypeError, RuntimeError):
        return None
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    labels = labels.detach().cpu().long()  # of uint64 what is too large becomes negative
    return None if int(labels.min()) < 0 else labels


def names_of(dataset: Any) -> list[str] | None:
    """The names of the classes, where the data set has them.

    Raises:
        DataError: it has several parts, in which a label means different classes.
    """
    if isinstance(dataset, Subset):
        return names_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        first, *others = [names_of(part) for part in dataset.datasets]
        for other in others:
            pairs = enumerate(zip_longest(first or [], other or []))
            differing = next((label for label, (one, two) in pairs if one != two), None)
            if differing is not None:
                raise DataError(
                    "parts of a ConcatDataset must have the same classes in the same order, since "
                    f"labels are numbers of them, got {_name(first, differing)} and "
                    f"{_name(other, differing)} for label {differing}"
                )
        return first
    if getattr(dataset, "target_transform", None) is not None:
        return None

    numbers = getattr(dataset, "class_to_idx", None)
    if isinstance(numbers, Mapping) and sorted(numbers.values()) == list(range(len(numbers))):
        return [str(name) for name in sorted(numbers, key=numbers.__getitem__)]
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and names:
        synonyms = [(name,) if isinstance(name, str) else tuple(name) for name in names]
        return [", ".join(map(str, each)) for each in synonyms]
    return None


def _name(names: Sequence[str] | None, label: int) -> str:
    """The name of a label in an error, where there may be none."""
    return repr(names[label]) if names is not None and label < len(names) else "no name"


def _content(dataset: Any) -> list[Sequence[object]]:
    """What is known of the images without reading files: arrays, sizes of files, transforms."""
    if isinstance(dataset, Subset):
        return [list(dataset.indices), *_content(dataset.dataset)]
    if isinstance(dataset, ConcatDataset):
        return [line for part in dataset.datasets for line in _content(part)]

    lines: list[Sequence[object]] = []
    arrays = [getattr(dataset, "data", None), *getattr(dataset, "tensors", ())]
    for values in arrays:
        if isinstance(values, Tensor):
            values = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        if isinstance(values, np.ndarray) and values.dtype != object:
            held = not isinstance(values, np.memmap)  # else it is a file, which may be large
            known = zlib.crc32(np.ascontiguousarray(values).data) if held else ""
            lines.append((values.shape, values.dtype, known))

    for sample in getattr(dataset, "samples", None) or []:
        path = sample[0] if isinstance(sample, tuple | list) and sample else sample
        if isinstance(path, str | os.PathLike) and os.path.isfile(path):
            lines.append((os.path.basename(path), os.path.getsize(path)))
    for name in ("transform", "transforms"):
        lines.append((without_addresses(repr(getattr(dataset, name, None))),))
    return lines
