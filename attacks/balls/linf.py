"""The Linf norm: no pixel changes by more than eps."""

from collections.abc import Callable

import torch
from torch import Tensor

from ironmoe.attacks.balls import lengths
from ironmoe.attacks.balls.abilities import BoxBall, HyperplaneBall, StraightBall
from ironmoe.attacks.balls.ball import Ball, register_norm
from ironmoe.attacks.balls.elements import Box
from ironmoe.attacks.balls.hyperplane import all_at_once, step_to_hyperplane
from ironmoe.attacks.balls.scaled import ScaledBall
from ironmoe.attacks.random import uniform
from ironmoe.kernels.attack_step import column, linf_ascent, linf_step


@register_norm
class LinfBall(BoxBall, StraightBall, HyperplaneBall):
    """max |z − x| ≤ eps and bounds[0] ≤ z ≤ bounds[1]. The two are one box, so clamping is the
    exact projection.

    Args (beyond those of ``Ball``):
        low, high: (B, …) the edges of this box, if they are known from an earlier step.
    """

    norm = "Linf"
    kept = ("low", "high")
    # A step adds or takes away alpha at each pixel, so a few of them lead back to the same numbers.
    steps_come_back = True

    def __init__(
        self,
        center: Tensor,
        eps: Tensor,
        bounds: Box,
        low: Tensor | None = None,
        high: Tensor | None = None,
    ) -> None:
        super().__init__(center, eps, bounds)
        self._edges = None if low is None or high is None else (low, high)

    @classmethod
    def scaled(cls) -> Callable[..., Ball]:
        return ScaledLinfBall if cls is LinfBall else super().scaled()

    @classmethod
    def exceeds(cls, eps: float, low: float, high: float, elements: int | None = None) -> bool:
        return eps > high - low

    @property
    def low(self) -> Tensor:
        return self._made_edges()[0]

    @property
    def high(self) -> Tensor:
        return self._made_edges()[1]

    def edges(self) -> dict[str, Tensor]:
        return {"low": self.low, "high": self.high}

    def _made_edges(self) -> tuple[Tensor, Tensor]:
        if self._edges is None:
            exact_center = self.center.double()
            radius = self._radii(exact_center)
            low = (exact_center - radius).to(self.center.dtype)
            high = (exact_center + radius).to(self.center.dtype)

            # Rounding may have gone outwards by one unit in the last place: then take the next
            # number inwards.
            low = torch.where(exact_center - low > radius, low.nextafter(high), low)
            low = low.clamp(*self.bounds)
            high = torch.where(high - exact_center > radius, high.nextafter(low), high)
            high = high.clamp(*self.bounds)
            self._edges = low, high
        return self._edges

    def _radii(self, like: Tensor) -> Tensor:
        """How far each element may move, float64, shaped to go with the batch ``like`` (B, …)."""
        return column(self.eps, like)

    def project(self, point: Tensor) -> Tensor:
        return point.clamp(self.low, self.high)

    def ascend(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        return linf_ascent(point, grad, alpha)

    def step(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        return linf_step(point, grad, self.low, self.high, alpha)[0]

    def random_point(self, keys: Tensor) -> Tensor:
        noise = self.random_direction(keys, self.center.shape[1:], self.center.dtype)
        # The same ball in the box; infinity times a noise of 0 would be NaN.
        radius = self.eps.clamp_max(self.bounds[1] - self.bounds[0])
        return self.project(self.center + column(radius, self.center) * noise)

    def random_sphere_point(self, keys: Tensor) -> Tensor:
        noise = self.random_direction(keys, self.center.shape[1:], self.center.dtype)
        stretch = self.eps / self.length(noise).clamp_min(lengths.SHORTEST_DIRECTION)
        return self.center + column(stretch, self.center) * noise

    def distance(self, point: Tensor) -> Tensor:
        return lengths.largest(point.double() - self.center.double())

    @staticmethod
    def length(step: Tensor) -> Tensor:
        return lengths.largest(step)

    @staticmethod
    def dual_length(weight: Tensor) -> Tensor:
        return lengths.total(weight)

    @staticmethod
    def step_to_hyperplane(point: Tensor, weight: Tensor, value: Tensor, bounds: Box) -> Tensor:
        """All pixels move equally fast."""

        def equally_fast(size: Tensor, room: Tensor, needed: Tensor) -> Tensor:
            return all_at_once(size, room, needed, speed=torch.ones_like(size))

        return step_to_hyperplane(point, weight, value, bounds, equally_fast)

    @staticmethod
    def random_direction(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uniform in the cube from −1 to 1."""
        return 2 * uniform(keys, shape, dtype) - 1


class ScaledLinfBall(ScaledBall, LinfBall):
    """|z − x| ≤ eps · scale and bounds[0] ≤ z ≤ bounds[1], element by element: still a box."""

    def _radii(self, like: Tensor) -> Tensor:
        return torch.where(self.free, column(self.eps, like) * self.scale, 0)

    def ascend(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        length = column(alpha, self.scale) * self.scale
        return point + length.to(point.dtype) * grad.sign().to(point.dtype)

    def _steepest(self, point: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
        return column(alpha, weight) * weight.sign()

    def random_point(self, keys: Tensor) -> Tensor:
        low, high = self.bounds
        farthest = self._radii(self.scale).minimum((high - low).double())
        noise = self._random_units(keys)
        return self.project(self.center + farthest.to(noise.dtype) * noise)

    def distance(self, point: Tensor) -> Tensor:
        """Where an element lies within eps · scale, rounding does not put it beyond eps."""
        change = (point.double() - self.center.double()).abs()
        eps = column(self.eps, self.scale).double()
        units = torch.where(self.free, change / self.scale, 0)

        beyond = eps.nextafter(torch.full_like(eps, float("inf")))
        within = change <= self._radii(self.scale)
        units = torch.where(within, units.minimum(eps), units.maximum(beyond))
        return lengths.largest(torch.where(~self.free & (change > 0), float("inf"), units))
