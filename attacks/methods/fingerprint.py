"""Points recognised by a number."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ironmoe.attacks.random import mix


def fingerprint(points: Tensor) -> Tensor:
    """(B,) int64, equal for equal points (B, …) of float32 or float64 and, but for one chance in
    about 2⁴⁰, for no others; never 0."""
    bits = (
        points.flatten(1)
        .contiguous()
        .view(torch.int32 if points.element_size() == 4 else torch.int64)
        .to(torch.int64)
    )
    return mix((bits * _weights(math.prod(bits.shape[1:]), points.device)).sum(1)) | 1


@lru_cache(maxsize=8)
def _weights(count: int, device: torch.device) -> Tensor:
    """Random odd factors: a sum of products with them modulo 2⁶⁴ tells apart what differs."""
    return mix(torch.arange(count, device=device)) | 1
