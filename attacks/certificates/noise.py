"""Gaussian noise for the copies of an image: it depends on (seed, image, draw, copy) and on nothing
else.

A *draw* is a set of copies that serves one purpose. Copies of two draws are independent of each
other, as Cohen et al. need them for the choice of the class and for the estimate.
"""

from enum import IntEnum

import torch
from torch import Tensor

from ironmoe.attacks.random import example_keys, normal

# More copies than any draw has.
COPIES = 1 << 40
# Numbers made at once: on CPU what fits into the cache, elsewhere what fits into the memory.
ELEMENTS_CPU = 1 << 16
ELEMENTS = 1 << 24


class Draw(IntEnum):
    """What copies are for. Attack k of a curve is followed by a prediction of its own, with the
    number PREDICTION + k."""

    SELECTION = 1
    ESTIMATE = 2
    LOOK = 3
    ATTACK = 4
    PREDICTION = 5


def copy_keys(seed: int, indices: Tensor, draw: int | Tensor, copies: Tensor) -> Tensor:
    """(R,) int64 keys of copies (R,) of the images with the numbers ``indices`` (R,), in one draw
    or in one each (R,)."""
    # ``example_keys`` depends on seed + index: image i under seed 1 would have the noise of image
    # i + 1 under seed 0, and runs under several seeds would not be independent of each other. It
    # stays as it is, since journals of evaluations depend on it; here the seed is mixed first.
    unrelated = int(example_keys(seed, torch.zeros(1, dtype=torch.int64), 0))
    return example_keys(unrelated, indices, copies + draw * COPIES)


def with_noise(images: Tensor, sigma: float, keys: Tensor) -> Tensor:
    """images (R, …) plus independent Gaussian noise of standard deviation ``sigma`` in each
    element. Nothing is clamped: a certificate is about the noise as it is."""
    shape = images.shape[1:]
    at_once = ELEMENTS_CPU if images.device.type == "cpu" else ELEMENTS
    rows = max(1, at_once // max(shape.numel(), 1))

    noisy = torch.empty_like(images)
    for part, place, key in zip(
        images.split(rows), noisy.split(rows), keys.split(rows), strict=True
    ):
        torch.add(part, normal(key, tuple(shape), images.dtype), alpha=sigma, out=place)
    return noisy
