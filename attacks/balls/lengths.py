"""Lengths of a batch of vectors, and what keeps a division by one of them finite."""

import torch
from torch import Tensor

SHORTEST_DIRECTION = 1e-12
"""A random direction counts as at least so long, so that one of length 0 stays where it is."""

SHORTEST_STEP = 1e-300
"""A float64 step counts as at least so long: it may be divided by, and its own length is kept."""


def largest(values: Tensor) -> Tensor:
    """(B,) max |d| of each row of ``values`` (B, …), in its dtype."""
    return values.flatten(1).abs().amax(1)


def total(values: Tensor) -> Tensor:
    """(B,) Σ |d| of each row."""
    return values.flatten(1).abs().sum(1)


def euclidean(values: Tensor) -> Tensor:
    """(B,) ‖d‖₂ of each row, also where the squares of its entries would underflow or overflow."""
    flat = values.flatten(1)
    scale = largest(flat)
    return (flat / divisor(scale).unsqueeze(1)).norm(dim=1) * scale


def divisor(values: Tensor) -> Tensor:
    """``values`` ≥ 0, with 0 replaced by the smallest normal number, so that 0 / 0 gives 0."""
    return values.clamp_min(torch.finfo(values.dtype).tiny)
