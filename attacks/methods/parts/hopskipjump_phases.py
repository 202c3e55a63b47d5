"""The phases of HopSkipJump: how many points each asks about, and what comes next.

What the points are is in ``hopskipjump_points``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.balls.ball import Ball
from ironmoe.attacks.engine.attempts import Attempts, where
from ironmoe.attacks.methods.parts.hopskipjump_points import (
    LAST,
    PLACES,
    PROBE,
    SEARCH,
    START,
    STEP,
    Points,
    direction,
    places_of_search,
)

# A step is halved so often at most. Then the search goes on from where it is.
HALVINGS = 25


class Phases(NamedTuple):
    """The state of attempts, as they go from phase to phase. The numbers are options of the attack.

    Attempts have

    phase: (R,) int64
    iteration: (R,) int64, 0 before the first probes
    made: (R,) int64, how many points of its phase were asked about; how many queries of a search
    drawn: (R,) int64, the probes of earlier iterations
    reach: (R, …) the misclassified point from which the boundary is searched
    reach_distance: (R,) float64
    near, far: (R,) float64, shares of the way to ``reach``, between which the boundary lies
    base: (R, …) the misclassified point nearest to the boundary
    probe_sum, fooled_sum: (R, …) the sum of the probes' ways, and of those that were misclassified
    fooled_count: (R,) int64, how many were
    direction: (R, …) of the step
    point, place, fools: (R, …), (R,) int64 and (R,) bool, what the last query chose: the point that
        the search goes on from, its place in the query, and whether it is misclassified
    """

    points: Points
    steps: int
    initial_probes: int
    max_probes: int
    start_tries: int

    @property
    def max_queries(self) -> int:
        """No attempt makes more queries. A search for the boundary takes at most as many as a
        float64 has bits."""
        probes = (min(int(self.initial_probes * t**0.5), self.max_probes) for t in self._iterations)
        queries = sum(max(1, math.ceil(count / PLACES)) for count in probes)
        return self.start_tries + 52 * (self.steps + 1) + HALVINGS * self.steps + queries + 1

    @property
    def _iterations(self) -> range:
        return range(1, self.steps + 1)

    def begin(self, attempts: Attempts) -> None:
        """The first state of new attempts."""
        clean = attempts["clean"]
        zero = torch.zeros_like(attempts["key"])
        attempts |= dict.fromkeys(("iteration", "made", "drawn", "fooled_count", "place"), zero)
        attempts |= dict.fromkeys(("near", "reach_distance"), zero.double())
        attempts |= dict.fromkeys(("point", "reach", "base"), clean)
        blank = torch.zeros_like(clean)
        attempts |= dict.fromkeys(("probe_sum", "fooled_sum", "direction"), blank)
        attempts["phase"] = torch.full_like(zero, START)
        attempts["far"] = torch.ones_like(attempts["near"])
        attempts["fools"] = torch.zeros_like(attempts["finished"])

    def wanted(self, attempts: Attempts) -> Tensor:
        """(R, PLACES) bool: the places of a query that the search needs an answer about."""
        phase = attempts["phase"]
        searched = places_of_search(attempts["key"])
        left = self._limit(attempts) - attempts["made"]
        count = torch.where(phase == PROBE, left, left.clamp_max(searched))
        count = torch.where(phase == SEARCH, searched, count)
        count = torch.where(phase == LAST, 1, count)
        return torch.arange(PLACES, device=phase.device) < count.unsqueeze(1)

    def advance(self, attempts: Attempts, ball: Ball) -> None:
        """Go on from what the last query chose."""
        phase = attempts["phase"]
        fools = attempts["fools"]
        self._narrow(attempts, (phase == SEARCH))

        more = torch.where(phase == PROBE, PLACES, places_of_search(attempts["key"]))
        more = torch.where(phase == SEARCH, 1, more)
        limit = self._limit(attempts)
        attempts["made"] = (attempts["made"] + more).minimum(limit)
        all_made = attempts["made"] >= limit

        jumped = ((phase == START) | (phase == STEP)) & fools
        stays = (phase == STEP) & ~fools & all_made
        searched = (phase == SEARCH) & all_made
        to_probes = searched & (attempts["iteration"] < self.steps)
        to_step = (phase == PROBE) & all_made
        to_last = searched & ~to_probes | (phase == START) & ~fools & all_made

        self._begin_search(attempts, ball, jumped=jumped, stays=stays)
        self._begin_probes(attempts, to_probes)
        attempts["direction"] = where(to_step, direction(attempts), attempts["direction"])
        attempts["drawn"] = attempts["drawn"] + torch.where(to_step, attempts["made"], 0)

        phase = phase.masked_fill(jumped | stays, SEARCH).masked_fill(to_probes, PROBE)
        phase = phase.masked_fill(to_step, STEP).masked_fill(to_last, LAST)
        begins = jumped | stays | to_probes | to_step | to_last
        attempts["phase"] = phase
        attempts["made"] = attempts["made"].masked_fill(begins, 0)
        attempts["point"] = where(phase == LAST, attempts["base"], attempts["point"])
        attempts["finished"] = attempts["finished"] | (phase == LAST)

    def _narrow(self, attempts: Attempts, searching: Tensor) -> None:
        """The boundary lies between the first misclassified point of the query and the one before
        it; beyond all of them, if none is misclassified."""
        searched = places_of_search(attempts["key"])
        crossed = searching & attempts["fools"]
        place = torch.where(attempts["fools"], attempts["place"], searched)
        far = self.points.shares(attempts, place, searched)
        near = self.points.shares(attempts, place - 1, searched)
        attempts["far"] = torch.where(crossed, far, attempts["far"])
        attempts["near"] = torch.where(searching, near, attempts["near"])
        attempts["base"] = where(crossed, attempts["point"], attempts["base"])

    def _begin_search(
        self, attempts: Attempts, ball: Ball, *, jumped: Tensor, stays: Tensor
    ) -> None:
        """Search the boundary from the point that was found, or from where the attempt is, since no
        step was short enough."""
        begins = jumped | stays
        reach = where(jumped, attempts["point"], attempts["base"])
        reach = where(begins, reach, attempts["reach"])
        attempts["reach"] = reach
        attempts["reach_distance"] = torch.where(
            begins, ball.distance(reach), attempts["reach_distance"]
        )
        attempts["base"] = where(begins, reach, attempts["base"])
        attempts["near"] = attempts["near"].masked_fill(begins, 0)
        attempts["far"] = attempts["far"].masked_fill(begins, 1)

    def _begin_probes(self, attempts: Attempts, begins: Tensor) -> None:
        blank = torch.zeros_like(attempts["base"])
        for name in ("probe_sum", "fooled_sum"):
            attempts[name] = where(begins, blank, attempts[name])
        attempts["fooled_count"] = attempts["fooled_count"].masked_fill(begins, 0)
        attempts["iteration"] = attempts["iteration"] + begins

    def _limit(self, attempts: Attempts) -> Tensor:
        """(R,) int64: the phase ends when ``made`` is so large."""
        phase = attempts["phase"]
        levels = self.points.queries_of_search(attempts["clean"], places_of_search(attempts["key"]))
        root = attempts["iteration"].double().sqrt()
        probes = (self.initial_probes * root).long().clamp(1, self.max_probes)
        limit = torch.where(phase == PROBE, probes, HALVINGS)
        limit = torch.where(phase == START, self.start_tries, limit)
        return torch.where(phase == SEARCH, levels, limit)
