"""Images whose pixels take a number of evenly spaced values only, as 256 in a PNG.

A point of the search lies between two values of the grid, pixel by pixel. What counts is a grid
point near it, inside the ball. Distances are those of the grid itself: 8 of 255 steps are 8 / 255,
although the float32 numbers nearest to two grid values may lie a little further apart.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.balls.ball import Ball
from ironmoe.attacks.balls.elements import Box
from ironmoe.attacks.balls.lengths import divisor

# A radius reaches a grid value that lies beyond it by this share of the radius: float32 radii are
# rounded, too.
SLACK = 1e-6

# Images lie on the grid if no pixel is off it by more than so many units in the last place of a
# float32 as large as the largest valid pixel.
UNITS_OFF = 4


class Grid(NamedTuple):
    """low + k · (high − low) / (levels − 1), k = 0 … levels − 1.

    low, high: two numbers, or two float64 tensors that broadcast to the images
    """

    low: float | Tensor
    high: float | Tensor
    levels: int

    def value(self, level: Tensor) -> Tensor:
        """The float64 values of levels. Between 0 and 1 they are level / (levels − 1) rounded once,
        so that rounded to float32 they are what a PNG read back gives."""
        last = self.levels - 1
        return (self.low * (last - level) + self.high * level) / last

    def level(self, values: Tensor) -> Tensor:
        """(…) float64, where values lie, as real numbers."""
        width = self.high - self.low
        size = divisor(width) if isinstance(width, Tensor) else width
        return (values.double() - self.low) * (self.levels - 1) / size

    def nearest(self, values: Tensor) -> Tensor:
        """(…) float64, the level nearest to each value."""
        return self.level(values).round().clamp(0, self.levels - 1)


def grid_of(box: Box, levels: int) -> Grid:
    """The grid in a box; bounds are float64 from here on."""
    low, high = (bound.double() if isinstance(bound, Tensor) else bound for bound in box)
    return Grid(low, high, levels)


@torch.no_grad()
def on_grid(point: Tensor, clean: Tensor, ball: Ball, grid: Grid) -> Tensor:
    """(B, …) grid points near ``point``, inside the ball. Pixels at the level of the clean image
    are those of the clean image.

    Each pixel takes the nearest of the two values around it, if all of these together stay in the
    ball. Where they do not, some pixels take the value towards the clean image: ``Ball.reachable``
    says which.

    Args:
        point: (B, …) in the ball.
        clean: (B, …) on the grid but for rounding.
        ball: float64 balls around the grid values of ``clean``.
    """
    at_clean = grid.nearest(clean)
    level = grid.level(point).clamp(0, grid.levels - 1)
    nearest = level.round()
    is_on_grid = grid.value(nearest).to(point.dtype) == point
    level = torch.where(is_on_grid, nearest, level)

    outwards = level > at_clean
    inner = torch.where(outwards, level.floor(), level.ceil())
    outer = torch.where(outwards, level.ceil(), level.floor())
    wish = (level - inner).abs()
    takes = (wish >= 0.5) & ball.reachable(grid.value(inner), grid.value(outer), wish)

    chosen = torch.where(takes, outer, inner)
    return torch.where(chosen == at_clean, clean, grid.value(chosen).to(clean.dtype))


@torch.no_grad()
def grid_distance(point: Tensor, clean: Tensor, ball: Ball, grid: Grid, eps: Tensor) -> Tensor:
    """(B,) float64 distance of the grid values nearest to ``point`` and ``clean`` (B, …). What the
    radius ``eps`` (B,) reaches has no larger distance than that.

    Args:
        ball: as in ``on_grid``.
    """
    moved = grid.nearest(point) != grid.nearest(clean)
    there = torch.where(moved, grid.value(grid.nearest(point)), ball.center)
    distance = ball.distance(there)
    return torch.where(distance <= ball.eps, distance.minimum(eps), distance)


def check_on_grid(images: Tensor, box: Box, levels: int) -> None:
    """ValueError: images (N, …) that do not lie on the grid."""
    if not len(images):
        return
    grid = grid_of(box, levels)
    off = (images.double() - grid.value(grid.nearest(images))).abs()
    largest = max(float(torch.as_tensor(bound).abs().max()) for bound in box)
    wrong = off > UNITS_OFF * torch.finfo(torch.float32).eps * largest
    if bool(wrong.any()):
        example = int(wrong.flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"images must lie on the grid of levels={levels}, got a pixel that is "
            f"{float(off[example].max()):.3g} off it, first in example {example}; round the images "
            "first"
        )
