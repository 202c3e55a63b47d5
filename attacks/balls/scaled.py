"""What balls of all norms share whose radius or box differs from element to element.

Divided by its scale, each element has the same radius: the ball is a plain one in these *units*,
inside a box of its own around each element. So steps, distances and random points are those of the
plain ball. Only the Euclidean projection is another one, since it measures in pixels.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ironmoe.attacks.balls import lengths
from ironmoe.attacks.balls.abilities import HyperplaneBall
from ironmoe.attacks.balls.elements import Box
from ironmoe.kernels.attack_step import column

# A projection aims at a radius smaller by this share, so that no rounding goes beyond eps.
MARGIN = 2.0**-44

# Weights of a metric count as at least this, so that they may be divided by.
SMALLEST_WEIGHT = 1e-300

Nearest = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(size (B, D), room (B, D), radius (B, 1), weight (B, D)) → (B, D), as in ``weighted``."""


class ScaledBall(HyperplaneBall):
    """{z: ‖(z − center) / scale‖ ≤ eps, low ≤ z ≤ high}; elements of scale 0 do not move.

    Args (beyond those of ``Ball``):
        bounds: numbers or tensors that broadcast to the centers.
        scale: float64 in [0, 1], broadcasts to the centers; None: 1.
    """

    def __init__(
        self,
        center: Tensor,
        eps: Tensor,
        bounds: Box,
        scale: Tensor | None = None,
        **kept: Tensor | None,
    ) -> None:
        low, high = (
            bound.to(center) if isinstance(bound, Tensor) else center.new_full((), bound)
            for bound in bounds
        )
        super().__init__(center, eps, (low.expand_as(center), high.expand_as(center)), **kept)
        exact = center.new_ones((), dtype=torch.float64) if scale is None else scale
        self.scale = exact.to(center.device, torch.float64).expand_as(center)
        self.free: Tensor = self.scale > 0

    def __getitem__(self, keep: Tensor) -> "ScaledBall":
        low, high = self.bounds
        bounds = low[keep], high[keep]
        return type(self)(self.center[keep], self.eps[keep], bounds, self.scale[keep])

    @property
    def widest(self) -> Tensor:
        return lengths.largest(self.width)

    @property
    def movable(self) -> Tensor:
        return self.free.flatten(1).sum(1)

    def clip(self, point: Tensor) -> Tensor:
        return torch.where(self.free, super().clip(point), self.center)

    def in_pixels(self, units: Tensor) -> Tensor:
        return (units * self.scale).to(self.center.dtype)

    def in_units(self, change: Tensor) -> Tensor:
        return (self._units(change)).to(change.dtype)

    def _units(self, change: Tensor) -> Tensor:
        """``change`` (B, …) over the scale in float64; 0 for elements that do not move."""
        return torch.where(self.free, change.double() / self.scale, 0)

    def _rooms(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """How far each element may fall and rise from ``point`` (B, …), in units: two tensors
        (B, D) float64, the first ≤ 0."""
        low, high = self.bounds
        down = self._units((low - point.double()).clamp_max(0))
        up = self._units((high - point.double()).clamp_min(0))
        return down.flatten(1), up.flatten(1)

    def _weights(self, grad: Tensor) -> Tensor:
        """(B, …) float64, the gradient in units, divided by its largest entry, so that it does not
        underflow."""
        weight = torch.where(self.free, grad.double(), 0)
        largest = lengths.divisor(lengths.largest(weight))
        return weight / column(largest, weight) * self.scale

    def ascend(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        step = self._steepest(point, self._weights(grad), alpha)
        return point + self.in_pixels(step)

    @abstractmethod
    def _steepest(self, point: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
        """(B, …) the step of length alpha in units that raises a linear function with the weights
        (B, …), in units, the most."""

    def step(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        return self.pull_in(self.ascend(point, grad, alpha))

    def distance(self, point: Tensor) -> Tensor:
        """(B,) float64; inf where an element has moved that may not."""
        change = point.double() - self.center.double()
        stray = (~self.free & (change != 0)).flatten(1).any(1)
        return torch.where(stray, float("inf"), self.length(self._units(change)))

    def measure(self, step: Tensor) -> Tensor:
        return self.length(self._units(step)).to(step.dtype)

    def slope(self, weight: Tensor) -> Tensor:
        return self.dual_length(weight.double() * self.scale).to(weight.dtype)

    def step_onto(self, point: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        down, up = self._rooms(point)
        steeper = (weight.double() * self.scale).flatten(1)
        steeper = torch.where(self.free.flatten(1), steeper, 0)
        here = torch.zeros_like(steeper)
        step = self.step_to_hyperplane(here, steeper, value.double(), (down, up))
        return self.in_pixels(step.view_as(point))

    def random_step(self, keys: Tensor) -> Tensor:
        return self.in_pixels(self._random_units(keys))

    def _random_units(self, keys: Tensor) -> Tensor:
        return super().random_step(keys) * self.free

    def random_sphere_point(self, keys: Tensor) -> Tensor:
        noise = self._random_units(keys)
        stretch = self.eps / self.length(noise).clamp_min(lengths.SHORTEST_DIRECTION)
        return self.center + self.in_pixels(column(stretch, noise) * noise)

    def _radius(self) -> Tensor:
        """(B,) float64, eps, or, if that is infinite, the distance of the farthest corner."""
        low, high = self.bounds
        return self.eps.double().minimum(self.length(self._units(high - low)))

    def _pulled_in(self, point: Tensor, nearest: Nearest, metric: Tensor) -> Tensor:
        """The point of ball and box that is nearest to ``point`` (B, …) in a metric (B, …) of the
        units, rounded towards the center; ``point`` itself, clipped, if it lies inside."""
        exact = self.center.double()
        change = self._units(point.double() - exact)
        size = change.abs().flatten(1)
        down, up = self._rooms(self.center)
        room = torch.where(change.flatten(1) > 0, up, -down)
        radius = self.eps.double().unsqueeze(1)
        inside = self.length(size.minimum(room)) <= self.eps

        weight = torch.where(self.free, metric, 1).flatten(1).clamp_min(SMALLEST_WEIGHT)
        units = nearest(size, room, radius, weight)

        # Rounding may have left the step too long, and may round a point outwards.
        spent = self.length(units).clamp_min(lengths.SHORTEST_STEP)
        units = units * (self.eps * (1 - MARGIN) / spent).clamp_max(1).unsqueeze(1)
        pixels = units.view_as(exact) * self.scale
        moved = (exact + change.sign() * pixels).to(self.center.dtype)
        outwards = (moved.double() - exact).abs() > pixels
        moved = torch.where(outwards, moved.nextafter(self.center), moved)
        return self.clip(torch.where(column(inside, exact).bool(), point, moved))
