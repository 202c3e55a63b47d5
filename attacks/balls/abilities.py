"""What some attacks ask of a norm beyond ``Ball``: a norm inherits from a class here if it keeps
its promise.

An attack names the abilities that it needs, and the norms that it takes follow. Nothing here knows
an attack by name.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ironmoe.attacks.balls.ball import Ball
from ironmoe.attacks.balls.elements import Box


class BoxBall(Ball):
    """Ball and image box together are a box, too: from ``low`` to ``high``, pixel by pixel."""

    @property
    @abstractmethod
    def low(self) -> Tensor:
        """(B, …) the lowest point of ball and box."""

    @property
    @abstractmethod
    def high(self) -> Tensor:
        """(B, …) the highest one."""

    def reachable(self, inner: Tensor, outer: Tensor, wish: Tensor) -> Tensor:
        """Those whose outer value lies in the box."""
        return (outer >= self.low) & (outer <= self.high)


class PowerBall(Ball):
    """The norm is (Σ |d|^order)^(1 / order)."""

    order: ClassVar[int]

    def reachable(self, inner: Tensor, outer: Tensor, wish: Tensor) -> Tensor:
        """Those that wish it most, as many as the radius allows."""
        near, far = (
            self.in_units(at - self.center).abs().flatten(1) ** self.order for at in (inner, outer)
        )
        rank = wish.flatten(1)
        extra = torch.where(rank >= 0.5, far - near, 0)

        order = rank.argsort(dim=1, descending=True, stable=True)
        spent = near.sum(1, keepdim=True) + extra.gather(1, order).cumsum(1)
        affordable = spent <= self.eps.unsqueeze(1) ** self.order
        return torch.zeros_like(affordable).scatter(1, order, affordable).view_as(wish)

    @classmethod
    def exceeds(cls, eps: float, low: float, high: float, elements: int | None = None) -> bool:
        return elements is not None and eps > (high - low) * elements ** (1 / cls.order)


class StraightBall(Ball):
    """``ascend`` adds a step that depends on the gradient and the length alone, not on the point
    and its faces of the box. So it also moves sums of steps, and gradients may be summed for it."""

    @abstractmethod
    def random_sphere_point(self, keys: Tensor) -> Tensor:
        """(B, …) a random point at distance eps from the center; it may lie outside the box.
        ``keys`` (B,) as ``example_keys`` gives them."""


class SparseBall(Ball):
    """The steepest step moves few pixels, each as far as the box allows. How many pixels move then
    matters more than how far."""


class HyperplaneBall(Ball):
    """The nearest point of a hyperplane inside the box is known exactly.

    The static methods are those of a ball with one radius for all elements. An attack asks
    ``measure``, ``slope``, ``step_onto`` and ``random_step``, which know radii and bounds of the
    elements.
    """

    def measure(self, step: Tensor) -> Tensor:
        """(B,) the length of each row of ``step`` (B, …), in its dtype."""
        return self.length(step)

    def slope(self, weight: Tensor) -> Tensor:
        """(B,) by how much a linear function with these weights (B, …) changes at most in a step of
        length 1."""
        return self.dual_length(weight)

    def step_onto(self, point: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        """(B, …) ``step_to_hyperplane`` inside this ball's box."""
        return self.step_to_hyperplane(point, weight, value, self.bounds)

    def random_step(self, keys: Tensor) -> Tensor:
        """(B, …) a random direction, of any length; ``keys`` (B,) as ``example_keys`` gives
        them."""
        return self.random_direction(keys, self.center.shape[1:], self.center.dtype)

    @staticmethod
    @abstractmethod
    def length(step: Tensor) -> Tensor:
        """(B,) the norm of each row of ``step`` (B, …), in its dtype."""

    @staticmethod
    @abstractmethod
    def dual_length(weight: Tensor) -> Tensor:
        """(B,) the dual norm of each row: by how much a linear function with these weights (B, …)
        changes at most in a step of length 1."""

    @staticmethod
    @abstractmethod
    def step_to_hyperplane(point: Tensor, weight: Tensor, value: Tensor, bounds: Box) -> Tensor:
        """The shortest step d from ``point`` to {z: value + ⟨weight, z − point⟩ = 0} with point + d
        inside the box.

        Where the box does not meet the hyperplane, it is the step to the corner nearest to it: the
        one at which the linear function comes closest to 0. Pixels of weight 0 never move, and
        nothing waits for the device.

        Args:
            point: (B, …) float32 or float64, inside ``bounds``.
            weight: (B, …) gradient of the linear function.
            value: (B,) its value at ``point``.
            bounds: lowest and highest valid pixel; they may be infinite.

        Returns:
            (B, …) in the dtype of ``point``.
        """

    @staticmethod
    @abstractmethod
    def random_direction(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """(B, *shape) a random direction, of any length; ``keys`` (B,) as ``example_keys`` gives
        them."""
