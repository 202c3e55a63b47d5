"""Points just beyond the nearest swap of each image, where a search for jumps begins, too.

A gradient does not see a jump, so an ascent that starts at random meets one by chance alone.

Shape suffixes: B images.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.balls.abilities import HyperplaneBall
from ironmoe.attacks.balls.ball import Ball, ball_of
from ironmoe.attacks.engine.attempts import where
from ironmoe.attacks.smoothness.asking import Asked
from ironmoe.attacks.smoothness.layers import layer_names
from ironmoe.attacks.smoothness.routing_held import is_routed
from ironmoe.attacks.smoothness.swaps.nearest import Swaps, swaps_of

# Shares of the step: it closes the gap to first order, so the swap may come sooner or later.
SHARES = (1.0, 1.002, 1.005, 1.01, 1.02, 1.05, 1.1)


class SwapStarts(NamedTuple):
    """The nearest swap of each image.

    distance: (B,) float64; inf without one, NaN where it could not be told
    steps:    (B, …) to the swap; 0 without one
    """

    distance: Tensor
    steps: Tensor

    def points(self, x: Tensor, ball: Ball, radius: float) -> Iterator[Tensor]:
        """Points (B, …) of the ball on the way of the step, around the swap and at the end of the
        ball; the image itself where the swap lies beyond it. None if that holds for all images."""
        within = self.distance <= radius
        if not bool(within.any()):
            return
        outermost = torch.where(within & (self.distance > 0), radius / self.distance, 1.0)
        for share in (*(torch.full_like(outermost, each) for each in SHARES), outermost):
            column = share.view(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
            yield where(within, ball.project(x + column * self.steps), x)


def swap_starts(
    asked: Asked, x: Tensor, norm: str, routing: str, given: Swaps | None
) -> SwapStarts:
    """The nearest swaps of a batch, those that the caller has or all pairs of all tokens. There are
    none for a model that routes nothing, or whose routing is held.

    The distance is NaN for a norm without hyperplanes, and for a layer that ``nearest_swaps``
    refuses.
    """
    if given is not None:
        return SwapStarts(given.nearest, given.steps.to(x))
    nothing = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    if routing != "free" or not is_routed(asked.model):
        return SwapStarts(nothing, torch.zeros_like(x))
    unknown = SwapStarts(torch.full_like(nothing, math.nan), torch.zeros_like(x))
    if not issubclass(ball_of(norm), HyperplaneBall):
        return unknown
    try:
        found = swaps_of(asked, x, norm, layer_names(asked.model, None))
    except ValueError:
        return unknown
    return SwapStarts(found.nearest, found.steps)


def check_swaps(swaps: Swaps | None, count: int, norm: str) -> None:
    """Raises:
    TypeError: they are neither None nor ``Swaps``.
    ValueError: they are those of another number of images, or in another norm.
    """
    if swaps is None:
        return
    if not isinstance(swaps, Swaps):
        raise TypeError(
            f"swaps must be what nearest_swaps returned, or None, got {type(swaps).__name__}"
        )
    if len(swaps.nearest) != count or swaps.norm != norm:
        raise ValueError(
            f"swaps must be those of the {count} images of x in {norm}, got swaps of "
            f"{len(swaps.nearest)} in {swaps.norm}"
        )
