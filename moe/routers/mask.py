"""Masks of tokens: True marks a real token, False padding, which no decision and no loss sees.

A masked tensor keeps its shape, so nothing here depends on values. What padding holds is replaced
before anything is computed from it: after that even NaN in it could reach a gradient.
"""

import torch
from torch import Tensor

from ironmoe.kernels import Routing


def token_mask(mask: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The mask as bool. ValueError unless it has this shape, one value a token, and holds bool or
    integers (0: padding)."""
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"mask must be bool, or integers of which 0 marks padding, got {mask.dtype}"
        )
    if mask.shape != shape:
        raise ValueError(
            f"mask must have one value for each token, shape {tuple(shape)}, got "
            f"{tuple(mask.shape)}"
        )
    return mask.bool()


def zero_padding(values_TX: Tensor, mask: Tensor) -> Tensor:
    """(…, T, X) with 0 in place of whatever padding holds, NaN included. ``mask`` (…, T) bool."""
    return values_TX.where(mask[..., None], 0)


def mean_over_tokens(values_TX: Tensor, mask: Tensor | None) -> Tensor:
    """(…, T, X) → (…, X), the mean over the real tokens; 0 where there is none."""
    if mask is None:
        return values_TX.mean(-2)
    count_1 = mask.sum(-1, keepdim=True).clamp_min(1)
    return zero_padding(values_TX, mask).sum(-2) / count_1


def drop_padding(routing: Routing, mask: Tensor, num_experts: int) -> Routing:
    """The routing (T, K) with the choices of padding dropped: expert E, gate 0."""
    return Routing(
        zero_padding(routing.gates, mask),
        routing.experts.masked_fill(~mask[..., None], num_experts),
    )
