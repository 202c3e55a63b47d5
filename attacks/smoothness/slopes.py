"""The slope profile: how much the output changes within a radius, over that radius.

Of a smooth function it is flat for small radii, where it is the norm of the Jacobian. A jump makes
it rise as 1 / radius, since the change does not become smaller. A derivative sees no jump at all.

Shape suffixes: B images, R radii, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.balls.ball import Ball
from ironmoe.attacks.engine.attempts import where
from ironmoe.attacks.extra import Extra
from ironmoe.attacks.losses import margin
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.smoothness.ascent import (
    FIRST_STEP,
    LATER_STEP,
    Surroundings,
    ascent,
    random_start,
    rounding_of,
    surroundings,
)
from ironmoe.attacks.smoothness.asking import (
    Asked,
    asked_about,
    chunks,
    constant,
    measuring,
)
from ironmoe.attacks.smoothness.routing_held import check_routing, held_routing

OUTPUTS = ("logits", "margin")


@dataclass(repr=False)
class SlopeProfile:
    """The worst changes that were found around each of B images. All are lower estimates: a search
    finds points, and no proof that there is none that is worse.

    radii:    (R,) float64, ascending
    changes:  (B, R) float64, max ‖f(x + d) − f(x)‖ over ‖d‖ ≤ r
    slopes:   (B, R) float64, max ‖f(x + d) − f(x)‖ / ‖d‖ over 0 < ‖d‖ ≤ r. It does not fall with
        the radius, since the points of smaller balls count in larger ones
    rounding: (B,) float64, the change after each pixel moved by one unit in the last place. Changes
        that are not far above it are rounding, which looks like a jump
    norm, out, routing: as they were given
    """

    radii: Tensor
    changes: Tensor
    slopes: Tensor
    rounding: Tensor
    norm: str
    out: str
    routing: str

    @property
    def profile(self) -> Tensor:
        """(B, R) changes / radii: flat where f is smooth, 1 / r where it jumps. It is at most
        ``slopes``."""
        return self.changes / self.radii

    def __repr__(self) -> str:
        """What to read first, in place of all the tensors."""
        medians = self.profile.median(0).values.tolist() if len(self.profile) else []
        pairs = zip(self.radii.tolist(), medians, strict=False)
        shown = ", ".join(f"{median:.3g} at {radius:.3g}" for radius, median in pairs)
        return (
            f"SlopeProfile({len(self.profile)} images, {self.out}, {self.routing} routing, "
            f"{self.norm}; median {shown or 'of none'})"
        )


def slope_profile(
    model: Any,
    x: Tensor,
    radii: Sequence[float],
    *,
    norm: str = "Linf",
    out: str = "logits",
    routing: str = "free",
    labels: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    extra: Extra | None = None,
) -> SlopeProfile:
    """The worst change of the output within each radius, and the worst secant, by steepest ascent
    on the change. The search at each radius begins at random points of the ball and, from the
    second radius on, at the worst point so far, moved outwards.

    Costs (steps + 1) · restarts forward passes for the first radius and (steps + 1) ·
    (restarts + 1) for each other one, and a backward pass for each step. Float32 rounds changes at
    about 1e-6 of the logits, so small radii need a float64 model: ``rounding`` says how small.

    Args:
        model: any callable from images to logits, whose images do not influence each other; an
            nn.Module is measured in eval mode and comes back as it was.
        x: (B, …) float32 or float64 images.
        radii: finite numbers above 0 in the units of the images, in any order.
        norm: a registered norm, of d.
        out: "logits": the Euclidean length of their change; "margin": the change of the right logit
            minus the best wrong one.
        routing: as in ``held_routing``; what is held is the routing of ``x``.
        labels: (B,) int64, the right classes of the margin; None: those that the model names.
        steps: of each attempt, ≥ 0; restarts: attempts from random points at each radius, ≥ 1.
        bounds: lowest and highest valid pixel; None: any value is valid.
        seed: random points depend on it, on the number of the image and on the attempt alone.
        batch_size: images at a time.
        extra: further inputs of the model, one entry an image, as ``Attack.run`` takes them.

    Returns:
        ``SlopeProfile``.

    Raises:
        ValueError: an argument outside the above; images that influence each other; logits that are
            not finite, or without a graph that leads to the images.
        TypeError: images, labels or logits that are none.
    """
    check_counts(0, steps=steps)
    check_counts(1, restarts=restarts, batch_size=batch_size)
    check_routing(routing)
    if out not in OUTPUTS:
        raise ValueError(f"out must be one of {OUTPUTS}, got {out!r}")
    ascending = _checked_radii(radii)
    asked, x = asked_about(model, x, extra)
    place = surroundings(norm, bounds, x)
    numbers = torch.arange(len(x), device=x.device)

    parts = []
    with measuring(model):
        for places in chunks(len(x), batch_size):
            part = asked.part(places)
            right = None if labels is None else constant(labels)[places]
            with held_routing(model, x[places], routing, part):
                change = _change_of(part, x[places], out, right)
                parts.append(
                    _Search(change, x[places], place, seed, numbers[places]).over(
                        ascending, steps, restarts
                    )
                )

    nothing = torch.zeros(0, len(ascending), dtype=torch.float64, device=x.device)
    parts = parts or [(nothing, nothing, nothing[:, 0])]
    changes, slopes, rounding = (torch.cat(values) for values in zip(*parts, strict=True))
    return SlopeProfile(
        radii=torch.tensor(ascending, dtype=torch.float64, device=x.device),
        changes=changes,
        slopes=slopes,
        rounding=rounding,
        norm=norm,
        out=out,
        routing=routing,
    )


def _checked_radii(radii: Sequence[float]) -> list[float]:
    """The radii, ascending. ValueError: there is none, or one that is not finite and above 0."""
    numbers = sorted(float(radius) for radius in radii)
    if not numbers or not all(0 < radius < float("inf") for radius in numbers):
        raise ValueError(f"radii must be finite numbers above 0, at least one, got {radii}")
    return numbers


def _change_of(
    asked: Asked, x: Tensor, out: str, labels: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Points (B, …) → (B,) float64, how far the output is from that at ``x``."""
    with torch.no_grad():
        logits = asked(x).double()
    if out == "logits":
        return lambda point: (asked(point).double() - logits).norm(dim=1)

    right = logits.argmax(1) if labels is None else labels
    before = margin(logits, right)
    return lambda point: (margin(asked(point).double(), right) - before).abs()


class _Search:
    """The worst points of one batch, from radius to radius."""

    def __init__(
        self,
        change: Callable[[Tensor], Tensor],
        x: Tensor,
        place: Surroundings,
        seed: int,
        numbers: Tensor,
    ) -> None:
        self.change = change
        self.x = x
        self.place = place
        self.seed = seed
        self.numbers = numbers
        self.worst = x  # the point of the largest change
        self.largest = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        self.steepest = torch.zeros_like(self.largest)

    def over(
        self, radii: Sequence[float], steps: int, restarts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(changes (B, R), slopes (B, R), rounding (B,)) for ascending radii."""
        changes, slopes = [], []
        for number, radius in enumerate(radii):
            ball = self.place.around(self.x, radius)
            if number:
                outwards = self.x + (self.worst - self.x) * (radius / radii[number - 1])
                self._follow(ball, ball.project(outwards), steps, first=LATER_STEP)
            for attempt in range(restarts):
                place = number * restarts + attempt
                start = random_start(ball, self.seed, self.numbers, place)
                self._follow(ball, start, steps)
            changes.append(self.largest)
            slopes.append(self.steepest)

        rounding = rounding_of(self.change, self.x, self.seed, self.numbers)
        return torch.stack(changes, 1), torch.stack(slopes, 1), rounding

    def _follow(self, ball: Ball, start: Tensor, steps: int, first: float = FIRST_STEP) -> None:
        for point, change in ascent(ball, start, self.change, steps, first=first):
            distance = ball.distance(point)
            slope = torch.where(distance > 0, change / distance, 0)
            self.steepest = self.steepest.maximum(slope)
            larger = change > self.largest
            self.largest = torch.where(larger, change, self.largest)
            self.worst = where(larger, point, self.worst)
