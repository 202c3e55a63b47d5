"""The L2 norm: the Euclidean length of the change is at most eps."""

from collections.abc import Callable

import torch
from torch import Tensor

from ironmoe.attacks.balls import lengths
from ironmoe.attacks.balls.abilities import HyperplaneBall, PowerBall, StraightBall
from ironmoe.attacks.balls.ball import Ball, register_norm
from ironmoe.attacks.balls.elements import Box
from ironmoe.attacks.balls.hyperplane import all_at_once, step_to_hyperplane
from ironmoe.attacks.balls.scaled import ScaledBall
from ironmoe.attacks.balls.weighted import nearest_in_l2
from ironmoe.attacks.random import normal, uniform
from ironmoe.kernels.attack_step import column, l2_ascent, l2_projection, l2_step

# A point that rounding left outside is first shrunk by this share more than needed.
FIRST_MARGIN = 1e-7


@register_norm
class L2Ball(PowerBall, StraightBall, HyperplaneBall):
    """‖z − x‖₂ ≤ eps and bounds[0] ≤ z ≤ bounds[1]."""

    norm = "L2"
    order = 2
    # A change of all pixels is longer here than in Linf.
    usual_radii = (64, 128, 255, 510)
    usual_radius = 128

    @classmethod
    def scaled(cls) -> Callable[..., Ball]:
        return ScaledL2Ball if cls is L2Ball else super().scaled()

    def project(self, point: Tensor) -> Tensor:
        return l2_projection(point, self.center, self.eps, self.bounds)

    def ascend(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        return l2_ascent(point, grad, alpha)

    def step(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        return l2_step(point, grad, self.center, self.eps, self.bounds, alpha)[0]

    def random_point(self, keys: Tensor) -> Tensor:
        shape = self.center.shape[1:]
        dtype = self.center.dtype
        direction = self.random_direction(keys, shape, dtype)
        length = direction.flatten(1).norm(dim=1).clamp_min(lengths.SHORTEST_DIRECTION)

        # The volume within a radius grows with its power, the number of pixels.
        pixels = max(self.center[0].numel(), 1)
        share = uniform(keys, (1,), dtype, stream=2)[:, 0] ** (1 / pixels)
        widest = (self.bounds[1] - self.bounds[0]) * pixels**0.5  # radius of a ball around the box
        radius = self.eps.clamp_max(widest) * share
        return self.project(self.center + column(radius / length, self.center) * direction)

    def random_sphere_point(self, keys: Tensor) -> Tensor:
        direction = self.random_direction(keys, self.center.shape[1:], self.center.dtype)
        length = direction.flatten(1).norm(dim=1).clamp_min(lengths.SHORTEST_DIRECTION)
        return self.center + column(self.eps / length, self.center) * direction

    def tighten(self, point: Tensor) -> Tensor:
        """Shrinks what is too long by a margin that doubles until rounding no longer matters."""
        margin = FIRST_MARGIN
        eps = self.eps.double()
        while bool((over := self.distance(point) > eps).any()):
            shrink = eps / self.distance(point).clamp_min(lengths.SHORTEST_STEP) * (1 - margin)
            scale = torch.where(over, shrink, 1.0)
            shrunk = self.center + column(scale.clamp(0, 1), self.center) * (point - self.center)
            point = torch.where(column(over, point).bool(), shrunk.clamp(*self.bounds), point)
            margin = min(1.0, 2 * margin)
        return point

    def distance(self, point: Tensor) -> Tensor:
        return (point.double() - self.center.double()).flatten(1).norm(dim=1)

    @staticmethod
    def length(step: Tensor) -> Tensor:
        return lengths.euclidean(step)

    @staticmethod
    def dual_length(weight: Tensor) -> Tensor:
        return lengths.euclidean(weight)

    @staticmethod
    def step_to_hyperplane(point: Tensor, weight: Tensor, value: Tensor, bounds: Box) -> Tensor:
        """Each pixel moves as fast as its weight is large."""

        def by_weight(size: Tensor, room: Tensor, needed: Tensor) -> Tensor:
            return all_at_once(size, room, needed, speed=size)

        return step_to_hyperplane(point, weight, value, bounds, by_weight)

    @staticmethod
    def random_direction(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Normal, so that all directions are equally likely."""
        return normal(keys, shape, dtype)


class ScaledL2Ball(ScaledBall, L2Ball):
    """‖(z − x) / scale‖₂ ≤ eps and bounds[0] ≤ z ≤ bounds[1]: an ellipsoid in the box."""

    def project(self, point: Tensor) -> Tensor:
        return self._pulled_in(point, nearest_in_l2, metric=self.scale.square())

    def pull_in(self, point: Tensor) -> Tensor:
        def nearest(size: Tensor, room: Tensor, radius: Tensor, _: Tensor) -> Tensor:
            center = torch.zeros_like(size)
            return l2_projection(size, center, radius.squeeze(1), (center, room))

        return self._pulled_in(point, nearest, metric=torch.ones_like(self.scale))

    def _steepest(self, point: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
        return l2_ascent(torch.zeros_like(weight), weight, alpha)

    def random_point(self, keys: Tensor) -> Tensor:
        direction = self._random_units(keys)
        length = self.length(direction).clamp_min(lengths.SHORTEST_DIRECTION)

        # The volume within a radius grows with its power, the number of elements that may move.
        draw = uniform(keys, (1,), direction.dtype, stream=2)[:, 0].double()
        share = draw ** (1 / self.movable.clamp_min(1))
        stretch = self._radius() * share / length.double()
        return self.clip(self.center + self.in_pixels(column(stretch, self.scale) * direction))
