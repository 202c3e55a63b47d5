"""What HopSkipJump asks about: the points of each phase of its search.

The attack itself, which goes from phase to phase, is in ``methods/hopskipjump``. All draws depend
on the key of the attempt and the number of the draw alone.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ironmoe.attacks.balls.abilities import BoxBall, HyperplaneBall
from ironmoe.attacks.balls.ball import Ball, ball_of
from ironmoe.attacks.balls.lengths import divisor, euclidean, largest
from ironmoe.attacks.engine.attempts import Attempts, where
from ironmoe.attacks.random import mix, uniform
from ironmoe.kernels.attack_step import column

# The phases of an attempt: it looks for a first misclassified point, searches the boundary from
# there, asks about probes around the boundary point, looks for a step along the direction that they
# give, and searches the boundary again. In the last phase it hands over its last point.
START, SEARCH, PROBE, STEP, LAST = range(5)

# A query is about so many points at most.
PLACES = 25
# Devices whose batches may have any size, so that a point that is not needed is not asked about.
# Elsewhere, on a GPU, a query is about as many points in every phase.
ANY_SIZE = ("cpu",)
# The search for the boundary ends within this share of the distance at the latest.
LARGEST_THETA = 1e-3
# Probes of the first iteration are so far away, as a share of the pixel range.
FIRST_DELTA = 0.1
# Probes change a pixel by at least so many units in the last place, or steps of the grid that its
# values lie on.
LEAST_UNITS = 16
LEAST_STEPS = 2


class Points(NamedTuple):
    """Makes the points.

    norm: name of the norm
    gamma: widens the tolerance of the boundary search, and the distance of the probes
    starts: (M, …) images to start from, or None: random ones
    levels: how many values a pixel takes, or None: any
    """

    norm: str
    gamma: float
    starts: Tensor | None
    levels: int | None

    @property
    def geometry(self) -> type[Ball]:
        return ball_of(self.norm)

    def of(self, attempts: Attempts, ball: Ball, place: Tensor) -> Tensor:
        """(R, …) the points at these places (R,) of the attempts' present queries."""
        point = attempts["base"]
        makers = {
            START: self._start,
            SEARCH: self._between,
            PROBE: self._probe,
            STEP: self._step,
        }
        for phase, make in makers.items():
            now = attempts["phase"] == phase
            if not sizes_vary(point) or bool(now.any()):
                point = where(now, make(attempts, ball, place), point)
        return point

    def queries_of_search(self, clean: Tensor, searched: int) -> int:
        """How many queries a search for the boundary takes, of so many points each."""
        pixels = clean[0].numel()
        power = 2.0 if issubclass(self.geometry, BoxBall) else 1.5
        theta = min(self.gamma / pixels**power, LARGEST_THETA)
        theta = max(theta, torch.finfo(clean.dtype).eps)
        queries = 0
        while theta * (searched + 1) ** queries < 1:
            queries += 1
        return queries

    def shares(self, attempts: Attempts, place: Tensor, searched: int) -> Tensor:
        """(R,) which share of the way to ``reach`` lies at this place of a query; place −1 is
        ``near``."""
        step = (attempts["far"] - attempts["near"]) / (searched + 1)
        return attempts["near"] + (place + 1) * step

    def delta(self, attempts: Attempts, ball: Ball) -> Tensor:
        """(R,) the Euclidean length of the probes' ways, relative to the scale of each element: the
        paper's share of the distance of the last misclassified point, but not so little that
        rounding decides."""
        movable = (torch.zeros_like(attempts["eps"]) + ball.movable).clamp_min(1)
        delta = self.gamma / movable * attempts["reach_distance"]
        delta = torch.where(attempts["iteration"] == 1, FIRST_DELTA * ball.widest, delta)
        low, high = (torch.zeros_like(attempts["clean"]) + bound for bound in ball.bounds)
        farthest = largest(low).maximum(largest(high)).to(delta.dtype)
        unit = torch.finfo(attempts["clean"].dtype).eps * farthest
        least = LEAST_UNITS * unit
        if self.levels is not None:
            least = LEAST_STEPS * ball.widest / (self.levels - 1)
        return delta.maximum(least * movable.sqrt())

    def _start(self, attempts: Attempts, ball: Ball, place: Tensor) -> Tensor:
        """The next of the starting images, or a random one, uniform in the box."""
        clean = attempts["clean"]
        number = attempts["made"] + place
        if self.starts is not None:
            # Each attempt begins at a place of its own.
            first = mix(attempts["key"]) % len(self.starts)
            return ball.clip(self.starts[(first + number) % len(self.starts)])
        keys = _keys(attempts, START, number)
        draws = uniform(keys, tuple(clean.shape[1:]), clean.dtype)
        return ball.clip(ball.bounds[0] + ball.width * draws)

    def _between(self, attempts: Attempts, ball: Ball, place: Tensor) -> Tensor:
        """Points between the image and ``reach``: all of its changes shrunk alike, or, where ball
        and box are a box, the largest ones cut off."""
        clean = attempts["clean"]
        share = self.shares(attempts, place, places_of_search(clean))
        if issubclass(self.geometry, BoxBall):
            size = ball.in_pixels(column(share * attempts["reach_distance"], clean))
            return ball.clip(attempts["reach"].clamp(clean - size, clean + size))
        return ball.clip(clean + column(share, clean) * (attempts["reach"] - clean))

    def _probe(self, attempts: Attempts, ball: Ball, place: Tensor) -> Tensor:
        base = attempts["base"]
        keys = _keys(attempts, PROBE, attempts["drawn"] + attempts["made"] + place)
        way = cast(HyperplaneBall, ball).random_step(keys)
        length = self.delta(attempts, ball) / divisor(euclidean(ball.in_units(way)))
        return ball.clip(base + column(length, base) * way)

    def _step(self, attempts: Attempts, ball: Ball, place: Tensor) -> Tensor:
        """The longest step first, each further one half as long."""
        base = attempts["base"]
        length = ball.distance(base) / attempts["iteration"].clamp_min(1).sqrt()
        length = length * 0.5 ** (attempts["made"] + place)
        # Relative to the scale of each element, the direction is the gradient.
        gradient = ball.in_units(ball.in_units(attempts["direction"]))
        return ball.clip(ball.ascend(base, gradient, length))


def direction(attempts: Attempts) -> Tensor:
    """(R, …) which way leads to more misclassified points: the sum of the probes' ways, each
    weighted by whether it was misclassified less the mean of that. Where all probes have the same
    answer, it is the mean way, or the opposite one (equation 16 of the paper)."""
    count = attempts["made"].clamp_min(1)
    mean = attempts["fooled_count"] / count
    all_alike = (attempts["fooled_count"] == 0) | (attempts["fooled_count"] == count)
    sign = torch.where(attempts["fooled_count"] == 0, -1.0, 1.0)

    probes = attempts["probe_sum"]
    weighted = attempts["fooled_sum"] - column(mean, probes) * probes
    return where(all_alike, column(sign, probes) * probes, weighted)


def sizes_vary(values: Tensor) -> bool:
    """Whether batches on the device of these values may have any size."""
    return values.device.type in ANY_SIZE


def places_of_search(values: Tensor) -> int:
    """How many points a query is about outside the phase of probes, on the device of these
    values."""
    return 1 if sizes_vary(values) else PLACES


def _keys(attempts: Attempts, phase: int, number: Tensor) -> Tensor:
    """(R,) keys of the draws with these numbers in a phase."""
    return mix(mix(attempts["key"] + phase) + number)
