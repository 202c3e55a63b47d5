"""What an evaluation may cost, and what its queries have cost so far. Nothing is counted here:
callers say what they spent."""

import time


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
    """What the queries of one attack cost: passes of single images, and time.

    What was measured last counts most, since batches shrink as images fall.

    Attributes:
        forwards, seconds: of all queries so far.
    """

    KEPT = (0.98, 0.8)  # of what was known before, in a slow mean and in a fast one

    def __init__(self) -> None:
        self.forwards = 0
        self.seconds = 0.0
        self._means = [(0.0, 0.0, 0.0)] * len(self.KEPT)  # queries, forwards, seconds

    def add(self, queries: int, forwards: int, seconds: float) -> None:
        """So many queries of attempts took so many forward passes, and so long."""
        self.forwards += forwards
        self.seconds += seconds
        self._means = [
            (kept * mean[0] + queries, kept * mean[1] + forwards, kept * mean[2] + seconds)
            for kept, mean in zip(self.KEPT, self._means, strict=True)
        ]

    @property
    def is_known(self) -> bool:
        """Whether there was any query."""
        return all(queries > 0 for queries, _, _ in self._means)

    @property
    def forwards_per_query(self) -> float:
        """The larger one of the means."""
        return max(forwards / queries for queries, forwards, _ in self._means)

    @property
    def seconds_per_query(self) -> tuple[float, float]:
        """The smaller and the larger one of the means."""
        means = [seconds / queries for queries, _, seconds in self._means]
        return min(means), max(means)
