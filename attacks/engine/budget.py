"""What an evaluation may cost, and what its queries have cost so far. Nothing is counted here:
callers say what they spent."""

import time
from collections.abc import Callable


class Budget:
    """What an evaluation may cost. A forward pass of one image is one forward. Callers ask before
    they begin anything, so that nothing goes beyond the limit."""

    def __init__(self, max_forwards: int | None = None, max_seconds: float | None = None) -> None:
        for name, value in {"max_forwards": max_forwards, "max_seconds": max_seconds}.items():
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0 or None, got {value}")
        self.max_forwards = max_forwards
        self.max_seconds = max_seconds
        self.began = time.monotonic()

    def allows(self, spent: int, more: int) -> bool:
        """Whether ``more`` forwards may follow the ``spent`` ones, now."""
        in_time = self.max_seconds is None or time.monotonic() - self.began < self.max_seconds
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


class Pace:
    """How long the rounds of one attack take, or the calls of the judge.

    A round has a cost of its own, and so has each pass in it. Neither is known, but one measured
    round bounds both, and so any number of rounds and passes. What was measured last counts most,
    since batches shrink as images fall.

    Attributes:
        seconds: of all rounds so far.
        means: (rounds, forwards, seconds), weighted, in a slow mean and in a fast one.
    """

    KEPT = (0.98, 0.8)  # of what was known before

    def __init__(self) -> None:
        self.seconds = 0.0
        self.means = [(0.0, 0.0, 0.0)] * len(self.KEPT)

    def add(self, rounds: int, forwards: int, seconds: float) -> None:
        """So many rounds took so many forward passes of single images, and so long."""
        self.seconds += seconds
        self.means = [
            (kept * mean[0] + rounds, kept * mean[1] + forwards, kept * mean[2] + seconds)
            for kept, mean in zip(self.KEPT, self.means, strict=True)
        ]

    @property
    def is_known(self) -> bool:
        """Whether there was any round."""
        return all(rounds > 0 and forwards > 0 for rounds, forwards, _ in self.means)

    def shortest(self, rounds: float, forwards: float) -> float:
        """The least time of so many rounds with so many forward passes."""
        return min(self._seconds(rounds, forwards, min))

    def longest(self, rounds: float, forwards: float) -> float:
        """The most time of so many rounds with so many forward passes."""
        return max(self._seconds(rounds, forwards, max))

    def _seconds(
        self, rounds: float, forwards: float, end: Callable[[float, float], float]
    ) -> list[float]:
        """At one end all of the time is a cost of rounds, at the other one of passes."""
        return [end(rounds / mean[0], forwards / mean[1]) * mean[2] for mean in self.means]
