"""The search for the worst change within each radius, and for the steepest secant.

Shape suffixes: B images, R radii.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ironmoe.attacks.balls.ball import Ball
from ironmoe.attacks.engine.attempts import where
from ironmoe.attacks.smoothness.ascent import (
    FIRST_STEP,
    LATER_STEP,
    Surroundings,
    ascent,
    random_start,
)
from ironmoe.attacks.smoothness.swaps.starts import SwapStarts

# At these shares of its distance the steepest secant is looked for again.
SHORTER = (1 / 2, 1 / 4, 1 / 8, 1 / 16)

Change = Callable[[Tensor], Tensor]
"""Points (B, …) → (B,) float64, how far the output is from that at the images, with its graph."""


class SecantSearch:
    """The worst points of one batch, from radius to radius.

    Every point that any attempt visits counts for both: for the change, and for the secant, which
    is the change over the distance of the point.
    """

    def __init__(
        self,
        change: Change,
        x: Tensor,
        place: Surroundings,
        starts: SwapStarts,
        seed: int,
        numbers: Tensor,
    ) -> None:
        self.change = change
        self.x = x
        self.place = place
        self.starts = starts
        self.seed = seed
        self.numbers = numbers
        self.worst = x  # the point of the largest change
        self.largest = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        self.at_steepest = x
        self.steepest = torch.zeros_like(self.largest)

    def over(self, radii: Sequence[float], steps: int, restarts: int) -> tuple[Tensor, Tensor]:
        """(changes (B, R), slopes (B, R)) for ascending radii."""
        changes, slopes = [], []
        for number, radius in enumerate(radii):
            ball = self.place.around(self.x, radius)
            if number:
                outwards = self.x + (self.worst - self.x) * (radius / radii[number - 1])
                self._raise_change(ball, ball.project(outwards), steps, LATER_STEP)
            for attempt in range(restarts):
                place = number * restarts + attempt
                start = random_start(ball, self.seed, self.numbers, place)
                self._raise_change(ball, start, steps, FIRST_STEP)

            beyond = self._beyond_swap(ball, radius)
            if beyond is not None:
                self._raise_change(ball, beyond, steps, LATER_STEP)
            self._raise_secant(ball, steps)
            changes.append(self.largest)
            slopes.append(self.steepest)
        return torch.stack(changes, 1), torch.stack(slopes, 1)

    def _beyond_swap(self, ball: Ball, radius: float) -> Tensor | None:
        """(B, …) of the points around the nearest swaps those of the largest changes."""
        best, most = self.x, torch.full_like(self.largest, -1.0)
        for point in self.starts.points(self.x, ball, radius):
            with torch.no_grad():
                change = self.change(point)
            self._record(point, change, ball.distance(point))
            best = where(change > most, point, best)
            most = most.maximum(change)
        return None if bool((most < 0).all()) else best

    def _raise_change(self, ball: Ball, start: Tensor, steps: int, first: float) -> None:
        for point, change in ascent(ball, start, self.change, steps, first=first):
            self._record(point, change, ball.distance(point))

    def _raise_secant(self, ball: Ball, steps: int) -> None:
        """From the point of the steepest secant so far: nearer to the image first, and then at the
        distance that is best, since among points of one distance the steepest secant has the
        largest change."""
        outer = self.at_steepest
        for share in SHORTER:
            point = self.x + share * (outer - self.x)
            with torch.no_grad():
                change = self.change(point)
            self._record(point, change, ball.distance(point))
        nearer = self.place.around(self.x, ball.distance(self.at_steepest))
        self._raise_change(nearer, self.at_steepest, steps, LATER_STEP)

    def _record(self, point: Tensor, change: Tensor, distance: Tensor) -> None:
        slope = torch.where(distance > 0, change / distance, 0)
        self.at_steepest = where(slope > self.steepest, point, self.at_steepest)
        self.steepest = self.steepest.maximum(slope)
        self.worst = where(change > self.largest, point, self.worst)
        self.largest = self.largest.maximum(change)
