"""Images on their way into the engine: checked, numbered, and cut into units.

A *unit* is the images that must stay together: one image, or a group of images that influence each
other. Its size is the number of these images.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.balls.elements import Bounds, box_at


class Chunk(NamedTuple):
    """n images from the data: images (n, …), labels (n,), indices (n,) int64, eps (n,) float64 or
    None."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    eps: Tensor | None = None

    def part(self, chosen: slice | Tensor) -> "Chunk":
        """Some of the images, by their places or by a mask."""
        eps = None if self.eps is None else self.eps[chosen]
        return Chunk(self.images[chosen], self.labels[chosen], self.indices[chosen], eps)


def prepared(images: Tensor, labels: Tensor, indices: Tensor | None, first: int = 0) -> Chunk:
    """A chunk of the images: detached, in at least float32, and numbered from ``first`` on where no
    indices are given."""
    numbers = torch.arange(first, first + len(images)) if indices is None else _plain(indices)
    wide = torch.promote_types(images.dtype, torch.float32)
    return Chunk(_plain(images).to(wide), _plain(labels), numbers.to(images.device, torch.int64))


def in_units(chunk: Chunk, unit_size: int) -> Iterator[tuple[Chunk, int]]:
    """(images, size of their units): whole units first, then what is left over as one smaller
    unit."""
    count = len(chunk.labels)
    whole = count // unit_size * unit_size

    if whole:
        yield chunk.part(slice(0, whole)), unit_size
    if count > whole:
        yield chunk.part(slice(whole, None)), count - whole


def check_images(images: Tensor, labels: Tensor, bounds: Bounds) -> None:
    """TypeError, ValueError: images that are no finite floats (N, …) inside the bounds, labels that
    are no int64 (N,)."""
    _check_kinds(images, labels)
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
            f"images must lie in bounds = {bounds}, got values from {low:.6g} to {high:.6g}, "
            f"first in example {_first(outside)}"
        )

    if int(labels.min()) < 0:
        raise ValueError(f"labels must be at least 0, got {int(labels.min())}")


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """ValueError: labels (N,) beyond the classes of logits (N, C)."""
    if len(labels) and int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels must be below the model's {logits.shape[1]} classes, got {int(labels.max())}"
        )


def _check_kinds(images: Any, labels: Any) -> None:
    """TypeError, ValueError: no tensors, or tensors of a wrong dtype, shape or device."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2:
        raise TypeError(f"images must be a floating point tensor (N, …), got {_kind(images)}")

    shape = (len(images),)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != shape:
        raise TypeError(f"labels must be an int64 tensor ({len(images)},), got {_kind(labels)}")
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
