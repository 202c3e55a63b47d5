"""The L1 norm: the sum of all changes is at most eps (Croce & Hein, arXiv 2103.01208).

In L1 the box must not be forgotten: the projection onto the ball alone, clamped afterwards, is
another point, and half an attack's budget is then lost at pixels that are white already.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ironmoe.attacks.balls import lengths
from ironmoe.attacks.balls.abilities import HyperplaneBall, PowerBall, SparseBall
from ironmoe.attacks.balls.ball import Ball, register_norm
from ironmoe.attacks.balls.elements import Box
from ironmoe.attacks.balls.hyperplane import one_after_another, step_to_hyperplane
from ironmoe.attacks.balls.scaled import MARGIN, ScaledBall
from ironmoe.attacks.balls.weighted import nearest_in_l1
from ironmoe.attacks.random import normal, uniform
from ironmoe.kernels.attack_step import column

# The sum of the exponential spacings counts as at least this, so that it may be divided by.
SMALLEST_SUM = 1e-30


@torch.no_grad()
def l1_projection(point: Tensor, center: Tensor, eps: Tensor, bounds: Box) -> Tensor:
    """The nearest point, in the Euclidean sense, of {z: ‖z − center‖₁ ≤ eps, bounds[0] ≤ z ≤
    bounds[1]}; (B, …) as ``point``.

    With y = point − center, of sizes a and with room r up to the face of the box on its side, the
    KKT conditions give sizes u = clamp(a − λ, 0, r) with the smallest λ ≥ 0 for which Σu ≤ eps. Σu
    as a function of λ is piecewise linear with its 2d breaks at a and a − r: sorted, they show the
    piece where it is eps, and on it λ follows from the sums over free and clipped pixels.

    Args:
        point, center: (B, …) float32 or float64, center inside ``bounds``.
        eps: (B,) radii; inf leaves the box alone.
        bounds: lowest and highest valid pixel.

    The result is rounded towards the center, so that its float64 distance is at most eps whatever
    the dtype.
    """
    x = center.flatten(1).double()
    y = point.flatten(1).double() - x
    # The faces of the box as the clamp below rounds them.
    low, high = (torch.tensor(bound, dtype=center.dtype, device="cpu").item() for bound in bounds)
    room = torch.where(y > 0, high - x, x - low)
    size = y.abs()
    radius = eps.double().unsqueeze(1)
    inside = size.minimum(room).sum(1, keepdim=True) <= radius
    shift = _shift(size, room, radius, center.dtype)
    length = (size - shift).clamp_min(0).minimum(room)

    # Rounding may have left the lengths too long, and may round a point outwards.
    spent = length.sum(1, keepdim=True).clamp_min(lengths.SHORTEST_STEP)
    length = length * (radius * (1 - MARGIN) / spent).clamp_max(1)
    wide = x + y.sign() * length
    moved = wide.to(center.dtype)
    outwards = (moved.double() - x).abs() > length
    moved = torch.where(outwards, moved.nextafter(center.flatten(1)), moved)
    return torch.where(inside, point.flatten(1), moved).view_as(center).clamp(*bounds)


def _shift(size: Tensor, room: Tensor, radius: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1) λ with Σ clamp(size − λ, 0, room) = radius (B, 1), or 0 where the sum is below at 0.
    Breaks are sorted in ``dtype``."""
    breaks, order = (
        torch.cat([size, (size - room).clamp_min(0)], 1).to(dtype).sort(dim=1, descending=True)
    )
    breaks = breaks.double()

    # Downwards, a pixel adds to the slope from its size on, until it is clipped.
    slope = torch.where(order < size.shape[1], 1.0, -1.0).double().cumsum(1)
    rises = slope[:, :-1] * (breaks[:, :-1] - breaks[:, 1:])
    sums = torch.cat([torch.zeros_like(radius), rises.cumsum(1)], 1)
    place = torch.searchsorted(sums, radius.contiguous()).clamp(1, sums.shape[1] - 1)
    upper = breaks.gather(1, place - 1)
    lower = breaks.gather(1, place)

    # The breaks and their sums are rounded; sums over the two kinds of pixels are exact.
    middle = (upper + lower) / 2
    free = (size > middle) & (size - room < middle)
    clipped = size - room >= middle
    spent = torch.where(free, size, torch.where(clipped, room, 0)).sum(1, keepdim=True)
    return ((spent - radius) / free.sum(1, keepdim=True).clamp_min(1)).clamp_min(0)


@torch.no_grad()
def l1_ascent(point: Tensor, grad: Tensor, alpha: Tensor, bounds: Box) -> Tensor:
    """The step that raises a linear loss the most of all whose L1 length inside the box is
    ``alpha`` (B,). The result is not clamped to the box.

    The pixel with the largest gradient goes to the face of the box, then the next, until alpha is
    spent. A step spread over more pixels, by the signs of the largest 1 % … 10 % of the gradients
    (Tramèr & Boneh, arXiv 1904.13000), ended at .998 … .64 of the optimum of linear models where
    this one reaches it, and fooled no trained network more often.

    A pixel that meets its face takes only its room off alpha but is pushed by alpha: the projection
    that follows shortens all pixels alike, and this keeps it at its face. So an optimum stays where
    it is.
    """
    sign = grad.flatten(1).sign().double()
    order = grad.flatten(1).abs().argsort(dim=1, descending=True, stable=True)
    at = point.flatten(1).double()
    budget = alpha.double().unsqueeze(1)
    room = torch.where(sign > 0, bounds[1] - at, at - bounds[0]).clamp_min(0)
    room = torch.where(room.isinf(), budget, room) * sign.abs()  # where pixels have no bound
    taken = room.gather(1, order)
    left = (budget - taken.cumsum(1) + taken).clamp_min(0)
    length = torch.where(taken <= left, budget, left) * (left > 0)
    moved = at + sign * torch.zeros_like(at).scatter(1, order, length)
    return moved.to(point.dtype).view_as(point)


@register_norm
class L1Ball(PowerBall, SparseBall, HyperplaneBall):
    """‖z − x‖₁ ≤ eps and bounds[0] ≤ z ≤ bounds[1]."""

    norm = "L1"
    order = 1
    needs_finite_bounds = True
    # A change of all pixels is far longer here than in Linf.
    usual_radii = (510, 1020, 2040, 3060)
    usual_radius = 3060

    @classmethod
    def scaled(cls) -> Callable[..., Ball]:
        return ScaledL1Ball if cls is L1Ball else super().scaled()

    def project(self, point: Tensor) -> Tensor:
        return l1_projection(point, self.center, self.eps, self.bounds)

    def ascend(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        return l1_ascent(point, grad, alpha, self.bounds)

    def random_point(self, keys: Tensor) -> Tensor:
        shape = self.center.shape[1:]
        dtype = self.center.dtype
        pixels = max(self.center[0].numel(), 1)

        # d of d + 1 exponentials, over the sum of all, are uniform in the simplex.
        spacings = -torch.log1p(-uniform(keys, (pixels + 1,), dtype))
        whole = spacings.sum(1, keepdim=True).clamp_min(SMALLEST_SUM)
        share = (spacings[:, :-1] / whole).view_as(self.center)
        sign = torch.where(uniform(keys, shape, dtype, stream=1) < 0.5, -1.0, 1.0)

        widest = (self.bounds[1] - self.bounds[0]) * pixels  # radius of a ball around the box
        radius = column(self.eps.clamp_max(widest), self.center)
        return self.project(self.center + radius * sign * share)

    def distance(self, point: Tensor) -> Tensor:
        return lengths.total(point.double() - self.center.double())

    @staticmethod
    def length(step: Tensor) -> Tensor:
        return lengths.total(step)

    @staticmethod
    def dual_length(weight: Tensor) -> Tensor:
        return lengths.largest(weight)

    @staticmethod
    def step_to_hyperplane(point: Tensor, weight: Tensor, value: Tensor, bounds: Box) -> Tensor:
        """Pixels move one after another, the one with the largest weight first."""
        return step_to_hyperplane(point, weight, value, bounds, one_after_another)

    @staticmethod
    def random_direction(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Normal: all pixels change."""
        return normal(keys, shape, dtype)


class ScaledL1Ball(ScaledBall, L1Ball):
    """‖(z − x) / scale‖₁ ≤ eps and bounds[0] ≤ z ≤ bounds[1]."""

    def project(self, point: Tensor) -> Tensor:
        return self._pulled_in(point, nearest_in_l1, metric=self.scale.square())

    def pull_in(self, point: Tensor) -> Tensor:
        def nearest(size: Tensor, room: Tensor, radius: Tensor, _: Tensor) -> Tensor:
            shift = _shift(size, room, radius, self.center.dtype)
            return (size - shift).clamp_min(0).minimum(room)

        return self._pulled_in(point, nearest, metric=torch.ones_like(self.scale))

    def _steepest(self, point: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
        here = torch.zeros_like(weight)
        return l1_ascent(here, weight, alpha, self._rooms(point))

    def random_point(self, keys: Tensor) -> Tensor:
        dtype = self.center.dtype
        count = max(self.center[0].numel(), 1)

        # d of d + 1 exponentials, over the sum of all, are uniform in the simplex.
        spacings = -torch.log1p(-uniform(keys, (count + 1,), dtype))
        moving = torch.nn.functional.pad(self.free.flatten(1), (0, 1), value=True)
        spacings = spacings * moving
        whole = spacings.sum(1, keepdim=True).clamp_min(SMALLEST_SUM)
        share = (spacings[:, :-1] / whole).view_as(self.center)
        sign = torch.where(uniform(keys, self.center.shape[1:], dtype, stream=1) < 0.5, -1.0, 1.0)

        radius = column(self._radius(), self.scale)
        return self.project(self.center + self.in_pixels(radius * sign * share))
