"""What an evaluation may cost, and what its queries have cost so far. Nothing is counted here:
callers say what they spent."""

import time
from collections.abc import Callable
from typing import NamedTuple


class Budget:
    """What an evaluation may cost. A forward pass of one image is one forward. Callers ask before
    they begin anything, so that nothing goes beyond the limit.

    agreed: what processes that do the same take for true, where their clocks differ.
    """

    def __init__(
        self,
        max_forwards: int | None = None,
        max_seconds: float | None = None,
        agreed: Callable[[bool], bool] = bool,
    ) -> None:
        for name, value in {"max_forwards": max_forwards, "max_seconds": max_seconds}.items():
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0 or None, got {value}")
        self.max_forwards = max_forwards
        self.max_seconds = max_seconds
        self.agreed = agreed
        self.began = time.monotonic()

    def allows(self, spent: int, more: int) -> bool:
        """Whether ``more`` forwards may follow the ``spent`` ones, now."""
        in_time = True
        if self.max_seconds is not None:
            in_time = self.agreed(time.monotonic() - self.began < self.max_seconds)
        return in_time and (self.max_forwards is None or spent + more <= self.max_forwards)

    def left(self, spent: int) -> float:
        """How many forwards are left after the ``spent`` ones; infinity without a limit."""
        return float("inf") if self.max_forwards is None else self.max_forwards - spent

    @property
    def seconds_left(self) -> float:
        """How much time is left; infinity without a limit."""
        if self.max_seconds is None:
            return float("inf")
        return max(0.0, self.began + self.max_seconds - time.monotonic())


class Mean(NamedTuple):
    """Sums over rounds of about the same size, in which older rounds count less."""

    rounds: float = 0.0
    forwards: float = 0.0
    seconds: float = 0.0

    def after(self, kept: float, rounds: float, forwards: float, seconds: float) -> "Mean":
        """With newer rounds added, and so much kept of what was known."""
        return Mean(
            kept * self.rounds + rounds,
            kept * self.forwards + forwards,
            kept * self.seconds + seconds,
        )

    @property
    def size(self) -> float:
        """Forward passes of single images in a round."""
        return self.forwards / self.rounds

    @property
    def cost(self) -> float:
        """Seconds of a round."""
        return self.seconds / self.rounds


class Pace:
    """How long the rounds of one attack take, or the calls of the judge.

    A round has a cost of its own, and so has each pass in it: a pass takes longer in a small batch
    than in a full one. So rounds are measured by their size, which is how many passes they make,
    in classes whose ends are powers of two. Between two sizes that were measured the cost follows a
    straight line. Beyond them, one measured round bounds both costs.

    Attributes:
        seconds: of all rounds so far.
        forwards: of all rounds so far.
        means: class of sizes → (a slow mean, a fast one).
    """

    KEPT = (0.98, 0.8)  # of what was known before

    def __init__(self) -> None:
        self.seconds = 0.0
        self.forwards = 0
        self.means: dict[int, tuple[Mean, ...]] = {}

    def add(self, rounds: int, forwards: int, seconds: float) -> None:
        """So many rounds took so many forward passes of single images, and so long."""
        self.seconds += seconds
        self.forwards += forwards
        if not rounds or not forwards:
            return
        size = (forwards // rounds).bit_length()
        known = self.means.get(size, (Mean(),) * len(self.KEPT))
        self.means[size] = tuple(
            mean.after(kept, rounds, forwards, seconds)
            for kept, mean in zip(self.KEPT, known, strict=True)
        )

    def join(self, other: "Pace", *, calls: int, weight: float) -> None:
        """Add what is known of another pace, each of whose rounds makes so many calls, and each of
        whose passes takes so many times as long."""
        for means in other.means.values():
            more = [Mean(m.rounds * calls, m.forwards, m.seconds / weight) for m in means]
            size = int(more[0].size).bit_length()
            known = self.means.get(size, (Mean(),) * len(self.KEPT))
            self.means[size] = tuple(
                mean.after(1.0, *new) for mean, new in zip(known, more, strict=True)
            )

    @property
    def is_known(self) -> bool:
        """Whether there was any round."""
        return bool(self.means)

    def shortest(self, rounds: float, forwards: float) -> float:
        """The least time of so many rounds with so many forward passes."""
        means = [mean for known in self.means.values() for mean in known]
        return min(min(rounds, forwards / mean.size) * mean.cost for mean in means)

    def longest(self, rounds: float, forwards: float) -> float:
        """The most time of so many rounds with so many forward passes. A cost that grows in
        proportion or less is highest where all rounds have the same size."""
        return max(self._seconds(number, rounds, forwards, 1) for number in range(len(self.KEPT)))

    def likely(self, rounds: float, forwards: float) -> float:
        """The time of so many rounds with so many forward passes, at the slow mean. Below all sizes
        that were measured it lies half-way between its bounds."""
        return self._seconds(0, rounds, forwards, 0.5)

    def _seconds(self, number: int, rounds: float, forwards: float, lowest: float) -> float:
        """lowest: of the smallest round that was measured, the share that is no cost of passes."""
        if not rounds or not forwards:
            return 0.0
        means = sorted((known[number] for known in self.means.values()), key=lambda m: m.size)
        size = forwards / rounds
        if size >= means[-1].size:
            return forwards / means[-1].size * means[-1].cost
        if size <= means[0].size:
            return rounds * means[0].cost * (lowest + (1 - lowest) * size / means[0].size)

        above = next(place for place, mean in enumerate(means) if mean.size > size)
        small, large = means[above - 1], means[above]
        share = (size - small.size) / (large.size - small.size)
        return rounds * (small.cost + share * (large.cost - small.cost))
