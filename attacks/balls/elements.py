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
    def side(self) -> dict[str, Tensor]:
        """The tensors that differ from image to image, as columns (N, …)."""
        tensors = {"scale": self.scale, "low_bound": self.low, "high_bound": self.high}
        return {
            name: value
            for name, value in tensors.items()
            if isinstance(value, Tensor) and len(value) > 1
        }


def region_of(eps: Bound, bounds: Bounds, shape: tuple[int, ...]) -> Region:
    """What eps and bounds mean for images of shape (N, …).

    Raises:
        ValueError: a tensor that does not broadcast to the images, or that could be read in two
            ways.
    """
    radius, scale = split(spread("eps", eps, shape))
    low, high = box_of(*(spread("bounds", bound, shape) for bound in bounds))
    return Region(radius, scale, low, high)


def spread(name: str, value: Bound, shape: tuple[int, ...]) -> Tensor:
    """``value`` as float64 of the rank of images (N, …), its first axis of length 1 or N; it
    broadcasts to them. (N,) is one number an image.

    Raises:
        ValueError: the shapes do not go together, or (N,) is the last axis of an image, too, and
            its numbers differ.
    """
    numbers = torch.as_tensor(value).detach().to(torch.float64)
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


def of_an_image(value: Bound, image_shape: tuple[int, ...]) -> Bound | None:
    """``value`` if it is the same for all images, whatever their number; None if it is one an
    image."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    by_image = value.ndim > len(image_shape) and len(value) > 1
    one_each = value.ndim == 1 and len(value) not in (1, *image_shape[-1:])
    return None if by_image or one_each else value


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


def box_of(low: Tensor, high: Tensor) -> tuple[Bound, Bound]:
    """Both as numbers where each holds one number throughout, else both as tensors."""
    if low.numel() and high.numel() and is_even(low) and is_even(high):
        return low.flatten()[0].item(), high.flatten()[0].item()
    return low, high


def is_even(values: Tensor) -> bool:
    """Whether all elements are the same number."""
    return values.numel() < 2 or bool((values == values.flatten()[0]).all())


def is_even_by_image(values: Tensor) -> bool:
    """Whether the elements of each image (n, …) are the same number."""
    rows = values.flatten(1)
    return bool((rows == rows[:, :1]).all())
