"""Images on their way into the engine: checked, numbered, and cut into units.

A *unit* is the images that must stay together: one image, or a group of images that influence each
other. Its size is the number of these images.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.balls.checked import bounds_text
from ironmoe.attacks.balls.elements import Bounds, box_at
from ironmoe.attacks.extra import extra_columns
from ironmoe.attacks.goals.goal import Goal

# Values that leave the bounds by at most this share of their width do so by rounding.
ROUNDING = 1e-4
# Images of which mean and standard deviation were taken away have no larger values.
LARGEST_NORMALISED = 10.0

DIVIDE = "if they are of 0 … 255, divide them by 255, or use bounds=(0, 255)"


class Chunk(NamedTuple):
    """n images from the data: images (n, …), labels (n, …), indices (n,) int64, eps (n,) float64 or
    None, and in ``side`` columns (n, …) that attempts carry with their image.

    unread: (n,) bool, images that could not be read and only take up their place; None: all were.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    eps: Tensor | None = None
    side: Mapping[str, Tensor] = {}
    unread: Tensor | None = None

    def part(self, chosen: slice | Tensor) -> "Chunk":
        """Some of the images, by their places or by a mask."""
        eps = None if self.eps is None else self.eps[chosen]
        side = {name: column[chosen] for name, column in self.side.items()}
        unread = None if self.unread is None else self.unread[chosen]
        return Chunk(
            self.images[chosen], self.labels[chosen], self.indices[chosen], eps, side, unread
        )

    def to(self, device: torch.device) -> "Chunk":
        """All of it on this device."""
        return Chunk(
            images=self.images.to(device),
            labels=self.labels.to(device),
            indices=self.indices.to(device),
            eps=None if self.eps is None else self.eps.to(device),
            side={name: column.to(device) for name, column in self.side.items()},
            unread=None if self.unread is None else self.unread.to(device),
        )


def prepared(
    images: Tensor, labels: Tensor, indices: Tensor | None, first: int = 0, *, extra: Any = None
) -> Chunk:
    """A chunk of the images: detached, in at least float32, and numbered from ``first`` on where no
    indices are given.

    Raises:
        TypeError, ValueError: ``extra`` is no further input with one entry an image.
    """
    side = extra_columns(extra, len(images))
    numbers = torch.arange(first, first + len(images)) if indices is None else _plain(indices)
    wide = torch.promote_types(images.dtype, torch.float32)
    return Chunk(
        images=_plain(images).to(wide),
        labels=_plain(labels),
        indices=numbers.to(images.device, torch.int64),
        side={name: _plain(column).to(images.device) for name, column in side.items()},
    )


def in_units(chunk: Chunk, unit_size: int) -> Iterator[tuple[Chunk, int]]:
    """(images, size of their units): whole units first, then what is left over as one smaller
    unit."""
    count = len(chunk.labels)
    whole = count // unit_size * unit_size

    if whole:
        yield chunk.part(slice(0, whole)), unit_size
    if count > whole:
        yield chunk.part(slice(whole, None)), count - whole


def check_images(images: Tensor, labels: Tensor, bounds: Bounds, goal: Goal) -> None:
    """TypeError, ValueError: images that are no finite floats (N, …) inside the bounds, labels that
    the goal does not take."""
    check_kinds(images, labels, goal)
    if len(images) == 0:
        return

    images = images.detach()
    if not bool(images.isfinite().all()):
        raise ValueError(
            "images must be finite, got NaN or infinity first in example "
            f"{_first(~images.isfinite())}"
        )

    lowest, highest = box_at(images, bounds)
    outside = (images < lowest) | (images > highest)
    if bool(outside.any()):
        low = float(images.min())
        high = float(images.max())
        raise ValueError(
            f"images must lie in bounds = {bounds_text(bounds)}, got values from {low:.6g} to "
            f"{high:.6g}, first in example {_first(outside)}, {_excess(images, lowest, highest)}"
        )


def _excess(images: Tensor, lowest: Any, highest: Any) -> str:
    """By how much images leave the bounds, and what that suggests."""
    low = float(images.min())
    high = float(images.max())
    width = float(torch.as_tensor(highest - lowest).max())
    excess = float((lowest - images).maximum(images - highest).max())
    outside = f"up to {excess:.2g} outside"

    if excess <= ROUNDING * width:
        return f"{outside}, as by rounding: use images.clamp(lowest, highest)"
    if low < 0 and max(-low, high) <= LARGEST_NORMALISED:
        return (
            f"{outside}. If they are normalised, give the images as they were before and "
            "normalize=(mean, std), or the bounds of these values"
        )
    if are_of_255(low, high):
        return f"{outside}. {DIVIDE[0].upper()}{DIVIDE[1:]}"
    return f"{outside}; bounds= says which values the model takes"


def are_of_255(low: float, high: float) -> bool:
    """Whether values from ``low`` to ``high`` are those of images of 0 … 255."""
    return low >= 0 and LARGEST_NORMALISED < high <= 255


def bytes_advice(images: Any) -> str:
    """What to do with images of whole numbers, as an error ends; nothing for others."""
    is_bytes = isinstance(images, Tensor) and images.dtype == torch.uint8
    return "; use images / 255, which lie in [0, 1]" if is_bytes else ""


def check_kinds(images: Any, labels: Any, goal: Goal) -> None:
    """TypeError, ValueError: no tensors, or tensors of a wrong dtype, shape or device."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2:
        raise TypeError(
            f"images must be a floating point tensor (N, …), got {_kind(images)}"
            f"{bytes_advice(images)}"
        )

    goal.check_labels(labels, len(images))
    if labels.device != images.device:
        raise ValueError(f"labels must be on {images.device} like images, got {labels.device}")


def _kind(value: Any) -> str:
    """What an error message says of a value: dtype and shape of a tensor, else the class."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _plain(tensor: Tensor) -> Tensor:
    """Detached; an inference tensor, which autograd refuses, becomes a copy that it takes."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _first(mask: Tensor) -> int:
    return int(mask.flatten(1).any(1).nonzero()[0])
