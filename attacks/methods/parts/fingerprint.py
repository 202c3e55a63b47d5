"""A number for each image, by which a point is recognised when it comes again."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ironmoe.attacks.random import mix


def fingerprint(points: Tensor) -> Tensor:
    """(B,) int64 for points (B, …) of float32 or float64: equal for equal points and, but for one
    chance in about 2⁴⁰, for no others; never 0."""
    as_integers = torch.int32 if points.element_size() == 4 else torch.int64
    bits = points.flatten(1).contiguous().view(as_integers).to(torch.int64)
    weights = _weights(math.prod(bits.shape[1:]), points.device)
    return mix((bits * weights).sum(1)) | 1


@lru_cache(maxsize=8)
def _weights(count: int, device: torch.device) -> Tensor:
    """Random odd factors. Points that differ have different sums of products with them, modulo 2⁶⁴,
    but for rare chance."""
    return mix(torch.arange(count, device=device)) | 1
