"""A limit to forward passes and time. It counts nothing itself: callers say what they spent."""

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
