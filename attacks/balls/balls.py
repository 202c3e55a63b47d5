"""Perturbation balls inside the image box: exact projection, steepest ascent, random points,
distances.

A ball holds a batch of B centers and radii. Everything is computed in the dtype of the centers
(float32 or float64).
"""

from typing import Protocol

import torch
from torch import Tensor

from ironmoe.attacks.balls.l1 import L1Ball
from ironmoe.attacks.random import normal, uniform
from ironmoe.kernels.attack_step import (
    column,
    l2_ascent,
    l2_projection,
    l2_step,
    linf_ascent,
    linf_step,
)

Bounds = tuple[float, float]


class Ball(Protocol):
    """What an attack asks of a threat model; ``LinfBall``, ``L2Ball`` and ``L1Ball`` are those
    there are.

    center: (B, …); eps: (B,) float64; inf leaves the box alone
    """

    center: Tensor
    eps: Tensor

    def __init__(self, center: Tensor, eps: Tensor, bounds: Bounds) -> None: ...

    def __getitem__(self, keep: Tensor) -> "Ball":
        """The ball of some of the examples."""

    def edges(self) -> dict[str, Tensor]:
        """What is worth keeping from one step to the next, by the name of the argument that takes
        it."""

    def project(self, point: Tensor) -> Tensor:
        """The nearest point, in the Euclidean sense, of ball and box."""

    def ascend(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        """A step of length ``alpha`` (B,), measured in the ball's norm, that raises a linear loss
        the most. Not projected."""

    def step(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        """``project(ascend(point, grad, alpha))``, fused where there is a GPU. Outside autograd."""

    def random_point(self, keys: Tensor) -> Tensor:
        """A point drawn uniformly from the ball, projected to the box; ``keys`` (B,) as
        ``example_keys`` gives them."""

    def tighten(self, point: Tensor) -> Tensor:
        """``point`` moved by rounding errors only, so that its float64 distance is at most eps."""

    def distance(self, point: Tensor) -> Tensor:
        """(B,) float64 distance from the center."""


class LinfBall:
    """max |z − x| ≤ eps and bounds[0] ≤ z ≤ bounds[1]. The two are one box, so clamping is the
    exact projection."""

    def __init__(
        self,
        center: Tensor,
        eps: Tensor,
        bounds: Bounds,
        low: Tensor | None = None,
        high: Tensor | None = None,
    ) -> None:
        self.center, self.eps, self.bounds = center, eps, bounds
        self._edges = None if low is None or high is None else (low, high)

    @property
    def low(self) -> Tensor:
        """(B, …) the lowest point of ball and box."""
        return self._made()[0]

    @property
    def high(self) -> Tensor:
        """(B, …) the highest one."""
        return self._made()[1]

    def edges(self) -> dict[str, Tensor]:
        return {"low": self.low, "high": self.high}

    def _made(self) -> tuple[Tensor, Tensor]:
        if self._edges is None:
            exact_center = self.center.double()
            radius = column(self.eps, exact_center)
            low, high = (
                (exact_center - radius).to(self.center.dtype),
                (exact_center + radius).to(self.center.dtype),
            )
            # Rounding may have gone outwards by one unit in the last place: then take the next
            # number inwards.
            low = torch.where(exact_center - low > radius, low.nextafter(high), low).clamp(
                *self.bounds
            )
            high = torch.where(high - exact_center > radius, high.nextafter(low), high).clamp(
                *self.bounds
            )
            self._edges = low, high
        return self._edges

    def __getitem__(self, keep: Tensor) -> "LinfBall":
        return LinfBall(self.center[keep], self.eps[keep], self.bounds)

    def project(self, point: Tensor) -> Tensor:
        return point.clamp(self.low, self.high)

    def ascend(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        return linf_ascent(point, grad, alpha)

    def step(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        return linf_step(point, grad, self.low, self.high, alpha)[0]

    def random_point(self, keys: Tensor) -> Tensor:
        noise = 2 * uniform(keys, self.center.shape[1:], self.center.dtype) - 1
        # the same ball; infinity times a noise of 0 would be NaN
        radius = self.eps.clamp_max(self.bounds[1] - self.bounds[0])
        return self.project(self.center + column(radius, self.center) * noise)

    def tighten(self, point: Tensor) -> Tensor:
        return self.project(point)

    def distance(self, point: Tensor) -> Tensor:
        return (point.double() - self.center.double()).flatten(1).abs().amax(1)


class L2Ball:
    """‖z − x‖₂ ≤ eps and bounds[0] ≤ z ≤ bounds[1]."""

    def __init__(self, center: Tensor, eps: Tensor, bounds: Bounds) -> None:
        self.center, self.eps, self.bounds = center, eps, bounds

    def __getitem__(self, keep: Tensor) -> "L2Ball":
        return L2Ball(self.center[keep], self.eps[keep], self.bounds)

    def edges(self) -> dict[str, Tensor]:
        return {}

    def project(self, point: Tensor) -> Tensor:
        return l2_projection(point, self.center, self.eps, self.bounds)

    def ascend(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        return l2_ascent(point, grad, alpha)

    def step(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        return l2_step(point, grad, self.center, self.eps, self.bounds, alpha)[0]

    def random_point(self, keys: Tensor) -> Tensor:
        shape, dtype = self.center.shape[1:], self.center.dtype
        direction = normal(keys, shape, dtype)
        length = direction.flatten(1).norm(dim=1).clamp_min(1e-12)
        pixels = max(self.center[0].numel(), 1)
        widest = (self.bounds[1] - self.bounds[0]) * pixels**0.5  # radius of a ball around the box
        radius = self.eps.clamp_max(widest) * uniform(keys, (1,), dtype, stream=2)[:, 0] ** (
            1 / pixels
        )
        return self.project(self.center + column(radius / length, self.center) * direction)

    def tighten(self, point: Tensor) -> Tensor:
        margin = 1e-7
        while bool((over := self.distance(point) > self.eps.double()).any()):
            scale = torch.where(
                over, self.eps.double() / self.distance(point).clamp_min(1e-300) * (1 - margin), 1.0
            )
            shrunk = self.center + column(scale.clamp(0, 1), self.center) * (point - self.center)
            point = torch.where(column(over, point).bool(), shrunk.clamp(*self.bounds), point)
            margin = min(1.0, 2 * margin)
        return point

    def distance(self, point: Tensor) -> Tensor:
        return (point.double() - self.center.double()).flatten(1).norm(dim=1)


BALLS: dict[str, type[Ball]] = {"Linf": LinfBall, "L2": L2Ball, "L1": L1Ball}
