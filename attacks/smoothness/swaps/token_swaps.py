"""The nearest swap of one token of each image, to first order.

Shape suffixes: B images, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.engine.attempts import where
from ironmoe.attacks.model_errors import check_graph
from ironmoe.attacks.smoothness.swaps.choices import Choices

PAIRS = ("next", "all")
"""Which swaps of a token are looked at, as ``nearest_swaps`` explains it."""


class TokenSwap(NamedTuple):
    """distance: (B,) float64; inf without a swap, or without a way to it
    gap:      (B,) difference of the keys of the two experts; inf without a swap
    leaving, coming: (B,) int64, the experts; E without a swap
    slope:    (B, …) float64, gradient of the gap with respect to the image
    """

    distance: Tensor
    gap: Tensor
    leaving: Tensor
    coming: Tensor
    slope: Tensor


def nearest_of_token(
    choices: Choices, point: Tensor, dual_length: Callable[[Tensor], Tensor], pairs: str
) -> TokenSwap:
    """The swap of one token of each image.

    Args:
        choices: of these tokens, (B, E), with their graph.
        point: (B, …) the images, a leaf of it. No image's choice depends on another image, so one
            backward pass serves them all.
        dual_length: (B, …) → (B,), the dual norm.
        pairs: one of ``PAIRS``.
    """
    if not bool(choices.can_swap.any()):
        return _of_pair(
            choices, *choices.next_pair(), torch.zeros_like(point).double(), dual_length
        )
    if pairs == "next":
        leaving, coming = choices.next_pair()
        slope = _slope(_gap(choices, leaving, coming), point)
        return _of_pair(choices, leaving, coming, slope, dual_length)

    slopes = [_slope(keys, point) for keys in choices.keys.unbind(1)]
    nearest = _of_pair(choices, *choices.next_pair(), torch.zeros_like(slopes[0]), dual_length)
    for first, slope_of_first in enumerate(slopes):
        for second, slope_of_second in enumerate(slopes):
            possible = choices.chosen[:, first] & choices.others[:, second]
            if not bool(possible.any()):
                continue
            swap = _of_pair(
                choices,
                torch.full_like(nearest.leaving, first),
                torch.full_like(nearest.coming, second),
                slope_of_first - slope_of_second,
                dual_length,
            )
            nearer = possible & (swap.distance < nearest.distance)
            nearest = TokenSwap(
                *(where(nearer, new, old) for new, old in zip(swap, nearest, strict=True))
            )
    return nearest


def _slope(raised: Tensor, point: Tensor) -> Tensor:
    """(B, …) float64, the gradient of the sum of ``raised`` (B,)."""
    check_graph(raised)
    (grad,) = torch.autograd.grad(raised.sum(), [point], retain_graph=True, allow_unused=True)
    return torch.zeros_like(point).double() if grad is None else grad.double()


def _gap(choices: Choices, leaving: Tensor, coming: Tensor) -> Tensor:
    """(B,) difference of keys with its graph; 0 where the token cannot swap."""
    first, second = (choices.keys.gather(1, each[:, None])[:, 0] for each in (leaving, coming))
    return (first - second).masked_fill(~choices.can_swap, 0)


def _of_pair(
    choices: Choices,
    leaving: Tensor,
    coming: Tensor,
    slope: Tensor,
    dual_length: Callable[[Tensor], Tensor],
) -> TokenSwap:
    """The swap between two experts (B,), whose gap has this gradient."""
    num_experts = choices.keys.shape[1]
    none = ~choices.can_swap
    # Scores that rounding makes equal are a tie, whatever their logits are.
    gap = _gap(choices, leaving, coming).detach().clamp_min(0).masked_fill(none, float("inf"))
    steepness = dual_length(slope)
    distance = torch.where(steepness > 0, gap.double() / steepness, float("inf"))
    return TokenSwap(
        distance=torch.where(gap == 0, 0.0, distance),
        gap=gap,
        leaving=leaving.masked_fill(none, num_experts),
        coming=coming.masked_fill(none, num_experts),
        slope=slope,
    )
