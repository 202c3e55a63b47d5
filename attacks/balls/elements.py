"""eps and bounds as a user may write them: a number, a number an image, a number an element.

A tensor that holds one number throughout means that number, so the fast ways stay open to it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

Bound = float | Tensor
Bounds = tuple[Bound, Bound]
"""Lowest and highest valid pixel, as a user writes them: numbers, or tensors that broadcast to an
image."""

Box = tuple[Any, Any]
"""The same as a ball takes them: two numbers, or two tensors (B, …)."""


class Region(NamedTuple):
    """What eps and bounds say of images of one shape; n is 1 or the number of images.

    radius: (n,) float64, the largest eps of an image
    scale: (n, …) float64 in [0, 1], eps over its largest element; None: one radius for all elements
    low, high: numbers, or both tensors (n, …) float64
    """

    radius: Tensor
    scale: Tensor | None
    low: Bound
    high: Bound

    @property
    def by_element(self) -> bool:
        """Whether the elements of an image differ."""
        return self.scale is not None or isinstance(self.low, Tensor)

    @property
    def side(self) -> dict[str, Tensor]:
        """The tensors that differ from image to image, as columns (N, …)."""
        return {name: value for name, value in self.tensors.items() if len(value) > 1}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of its tensors (n, …), under the names that they have as columns."""
        tensors = {"eps_scale": self.scale, "low_bound": self.low, "high_bound": self.high}
        return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}


def region_of(eps: Bound, bounds: Bounds, shape: tuple[int, ...]) -> Region:
    """What eps and bounds mean for images of shape (N, …).

    Raises:
        ValueError: a tensor that does not broadcast to the images, or that could be read in two
            ways; a lowest value above its highest one.
    """
    radius, scale = split(spread("eps", eps, shape))
    low, high = (spread("bounds", bound, shape) for bound in bounds)
    check_order(low, high)
    return Region(radius, scale, *box_of(low, high))


def spread(name: str, value: Bound, shape: tuple[int, ...]) -> Tensor:
    """``value`` as float64 on the CPU, of the rank of images (N, …), its first axis of length 1 or
    N; it broadcasts to them. (N,) is one number an image.

    Raises:
        ValueError: the shapes do not go together, or (N,) is the last axis of an image, too, and
            its numbers differ.
    """
    numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    rank = len(shape)
    count, width = shape[0], shape[-1]

    one_each = numbers.shape == (count,) and count != 1
    if one_each and width == count and not is_even(numbers):
        example = (count,) + (1,) * (rank - 1)
        element = (1,) * (rank - 1) + (count,)
        raise ValueError(
            f"{name} of shape ({count},) must say what it means, since there are {count} images "
            f"and their last axis has length {count}: give it the shape {example} for one number "
            f"an image, or {element} for one an element"
        )
    if one_each and width != count:
        return numbers.view(count, *(1,) * (rank - 1))

    padded = (1,) * (rank - numbers.ndim) + tuple(numbers.shape)
    fits = len(padded) == rank and all(
        own in (1, of_images) for own, of_images in zip(padded, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} must be a number or have shape ({count},), for one an image, or be a tensor "
            f"that broadcasts to an image {tuple(shape[1:])} or to the images {tuple(shape)}, got "
            f"shape {tuple(numbers.shape)}"
        )
    return numbers.view(padded)


def is_by_image(value: Bound, image_shape: tuple[int, ...]) -> bool:
    """Whether ``value`` holds one number, or one tensor, an image, and not the same for all images
    whatever their number."""
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) == 1:
        return False
    if value.ndim == 1:
        return value.shape[-1:] != tuple(image_shape[-1:])
    return value.ndim > len(image_shape)


def of_images(value: Bound, image_shape: tuple[int, ...], places: slice) -> Bound:
    """``value`` for some of the images: its rows, if it has one an image. A tensor comes in the
    rank of the images, so that what it means does not depend on how many there are here."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if is_by_image(value, image_shape):
        rows = value[places]
        return rows.view(-1, *(1,) * len(image_shape)) if rows.ndim == 1 else rows
    return value.view((1,) * (len(image_shape) + 1 - value.ndim) + tuple(value.shape))


class SharedElements:
    """What eps and bounds say of all images alike, where the images are. It is made once for each
    shape, since copying to a GPU makes the host wait."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Bound, Bounds, Shared]] = {}

    def of(self, eps: Bound, bounds: Bounds, images: Tensor) -> "Shared":
        """Those of images (R, …)."""
        if not any(isinstance(value, Tensor) and value.ndim for value in (eps, *bounds)):
            return Shared(None, *bounds)

        key = (tuple(images.shape[1:]), images.dtype, images.device)
        known = self._made.get(key)
        if known is None or known[0] is not eps or known[1] is not bounds:
            known = self._made[key] = (eps, bounds, _shared(eps, bounds, images))
        return known[2]


class Shared(NamedTuple):
    """scale: (1, …) float64, or None for 1; low, high: two numbers, or two tensors (1, …) in the
    dtype of the images; None for those that each image has of its own."""

    scale: Tensor | None
    low: Bound | None
    high: Bound | None


def _shared(eps: Bound, bounds: Bounds, images: Tensor) -> Shared:
    shape = (1, *images.shape[1:])
    scale = None if is_by_image(eps, shape[1:]) else split(spread("eps", eps, shape))[1]

    box: list[Tensor | None] = []
    for bound in bounds:
        numbers = torch.as_tensor(bound, dtype=torch.float64)
        if is_by_image(bound, shape[1:]):
            box.append(numbers.flatten()[:1].view((1,) * len(shape)) if is_even(numbers) else None)
        else:
            box.append(spread("bounds", bound, shape))

    low, high = box
    if low is not None and high is not None and is_even(low) and is_even(high) and scale is None:
        return Shared(None, low.flatten()[0].item(), high.flatten()[0].item())
    return Shared(
        scale=None if scale is None else scale.to(images.device),
        low=None if low is None else low.to(images),
        high=None if high is None else high.to(images),
    )


def split(eps: Tensor) -> tuple[Tensor, Tensor | None]:
    """(radius, scale) of ``Region`` for eps (n, …).

    Raises:
        ValueError: eps is infinite in some elements of an image, and neither infinite nor 0 in
            others.
    """
    if not eps.numel():
        return eps.new_zeros(len(eps)), None
    radius = eps.flatten(1).amax(1)
    if is_even_by_image(eps):
        return radius, None

    whole = radius.view(-1, *(1,) * (eps.ndim - 1))
    mixed = whole.isinf() & (eps > 0) & eps.isfinite()
    if bool(mixed.any()):
        raise ValueError(
            "eps must be infinite in all elements of an image that are not 0, or in none, got "
            f"{float(eps[mixed][0]):.6g} and infinity in one image"
        )
    scale = torch.where(eps == whole, 1.0, eps / whole)
    scale = torch.where((whole == 0) | (eps == 0), 0.0, scale)
    return radius, _rounded(scale, eps, whole)


def _rounded(scale: Tensor, eps: Tensor, radius: Tensor) -> Tensor:
    """``scale`` moved by one unit in the last place so that scale · radius, rounded, is eps, or, if
    that cannot be, so that it is not larger."""
    for other in (scale.nextafter(scale + 1), scale.nextafter(scale - 1)):
        nearer = (other * radius == eps) & (scale * radius != eps)
        scale = torch.where(nearer, other, scale)
    too_large = scale * radius > eps
    return torch.where(too_large, scale.nextafter(scale - 1), scale)


def check_order(low: Tensor, high: Tensor) -> None:
    """ValueError: a lowest value is not below its highest one. Of tensors, single elements may have
    both equal."""
    low, high = torch.broadcast_tensors(low, high)
    wrong = ~(low < high) if low.ndim == 0 or bool((low == high).all()) else ~(low <= high)
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        pair = f"({float(low[tuple(place)]):.6g}, {float(high[tuple(place)]):.6g})"
        where = f" at {place}" if place else ""
        raise ValueError(
            f"bounds must be (lowest, highest) with lowest < highest, got {pair}{where}"
        )


def box_of(low: Tensor, high: Tensor) -> tuple[Bound, Bound]:
    """Both as numbers where each holds one number throughout, else both as tensors."""
    if low.numel() and high.numel() and is_even(low) and is_even(high):
        return low.flatten()[0].item(), high.flatten()[0].item()
    return low, high


def box_at(images: Tensor, bounds: Bounds) -> Box:
    """bounds of a batch of images (N, …): two numbers, or two tensors that broadcast to it, in its
    dtype and where it is.

    Raises:
        ValueError: a tensor that does not broadcast to the images, or a lowest value above its
            highest one.
    """
    low, high = (spread("bounds", bound, tuple(images.shape)) for bound in bounds)
    check_order(low, high)
    lowest, highest = box_of(low, high)
    if isinstance(lowest, Tensor) and isinstance(highest, Tensor):
        return lowest.to(images), highest.to(images)
    return lowest, highest


def largest(value: Bound) -> float:
    """The largest number of all; 0 where there is none."""
    numbers = torch.as_tensor(value, dtype=torch.float64)
    return float(numbers.max()) if numbers.numel() else 0.0


def is_even(values: Tensor) -> bool:
    """Whether all elements are the same number."""
    return values.numel() < 2 or bool((values == values.flatten()[0]).all())


def is_even_by_image(values: Tensor) -> bool:
    """Whether the elements of each image (n, …) are the same number."""
    rows = values.flatten(1)
    return bool((rows == rows[:, :1]).all())
