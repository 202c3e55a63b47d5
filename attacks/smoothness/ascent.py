"""The search that slopes and linearity share: steepest ascent inside a ball around each image.

It is a plain loop. Attacks of this library leave an image that is misclassified as it is; here
every image counts, and every point of the way does.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ironmoe.attacks.balls.ball import Ball, ball_of
from ironmoe.attacks.balls.checked import checked_bounds
from ironmoe.attacks.model_errors import gradient
from ironmoe.attacks.random import example_keys, uniform

Value = Callable[[Tensor], Tensor]
"""Points (B, …) → (B,) what is raised, with its graph."""

# The first and the last step, in radii. A step of several radii goes where a linear function is
# largest in the ball, which for a convex function is never a step back; short ones end the search
# of others. A search that goes on from a good point begins with shorter ones.
FIRST_STEP, LATER_STEP, LAST_STEP = 4.0, 0.5, 1 / 8

# How often the images are moved by one unit in the last place.
PROBES = 2


@dataclass(frozen=True)
class Surroundings:
    """Where points may lie: a norm, and lowest and highest valid pixel."""

    ball: type[Ball]
    bounds: tuple[float, float]

    def around(self, x: Tensor, radius: float | Tensor) -> Ball:
        """Balls around images: of one radius, or of one for each (B,)."""
        radii = torch.as_tensor(radius, dtype=torch.float64, device=x.device).expand(len(x))
        return self.ball(x, radii, self.bounds)


def surroundings(norm: str, bounds: tuple[float, float] | None, x: Tensor) -> Surroundings:
    """The norm and the box of a search around images; ``bounds=None``: any pixel is valid.

    Raises:
        ValueError: an unknown norm, one that needs finite bounds without them, or images outside
            the bounds.
    """
    ball = ball_of(norm)
    pair = (-math.inf, math.inf) if bounds is None else bounds
    finite_for = f"norm={norm!r}" if ball.needs_finite_bounds else None
    low, high = (float(bound) for bound in checked_bounds(pair, finite_for=finite_for))
    if len(x) and not bool(((x >= low) & (x <= high)).all()):
        raise ValueError(
            f"x must lie in bounds = ({low:.6g}, {high:.6g}), got values from {float(x.min()):.6g} "
            f"to {float(x.max()):.6g}"
        )
    return Surroundings(ball, (low, high))


def random_start(ball: Ball, seed: int, numbers: Tensor, attempt: int) -> Tensor:
    """(B, …) a point drawn uniformly from each ball. It depends on the seed, the number of the
    image (B,) and the attempt, and on nothing else."""
    return ball.random_point(example_keys(seed, numbers, attempt))


def ascent(
    ball: Ball, start: Tensor, value: Value, steps: int, *, first: float = FIRST_STEP
) -> Iterator[tuple[Tensor, Tensor]]:
    """(points (B, …), their values (B,)) at the start and after each of the steps, which get
    shorter on the way, from ``first`` radii. Each step costs a forward and a backward pass, the
    last point another forward pass."""
    point = start
    for step in range(steps):
        leaf = point.detach().requires_grad_()
        raised = value(leaf)
        slope = gradient(raised, leaf)
        yield point, raised.detach()
        length = first * (LAST_STEP / first) ** (step / max(steps - 1, 1))
        point = ball.step(point, slope, length * ball.eps)

    with torch.no_grad():
        last = value(point)
    yield point, last


@torch.no_grad()
def rounding_of(value: Value, x: Tensor, unit: float, seed: int, numbers: Tensor) -> Tensor:
    """(B,) the largest value after every pixel moved by one unit in the last place, up or down at
    random: about what rounding alone makes of a value that is 0 at ``x``. ``unit`` is the relative
    size of that place in the lowest precision of the model, which smaller steps would not move."""
    at_least = x.abs() * unit if unit > torch.finfo(x.dtype).eps else torch.zeros_like(x)
    largest = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for probe in range(PROBES):
        up = uniform(example_keys(seed, numbers, -1 - probe), x.shape[1:], x.dtype) < 0.5
        beyond = torch.where(up, math.inf, -math.inf).to(x)
        moved = x.nextafter(beyond) + torch.where(up, at_least, -at_least)
        largest = largest.maximum(value(moved).double())
    return largest
