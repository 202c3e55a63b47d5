"""What an evaluation may cost."""

import time


class Budget:
    """What an evaluation may cost. A forward pass of one image is one forward; nothing is begun
    that could go beyond."""

    def __init__(self, max_forwards: int | None = None, max_seconds: float | None = None) -> None:
        for name, value in {"max_forwards": max_forwards, "max_seconds": max_seconds}.items():
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0 or None, got {value}")
        self.max_forwards, self.max_seconds = max_forwards, max_seconds
        self.began = time.monotonic()

    def allows(self, spent: int, more: int) -> bool:
        in_time = self.max_seconds is None or time.monotonic() - self.began < self.max_seconds
        return in_time and (self.max_forwards is None or spent + more <= self.max_forwards)

    def left(self, spent: int) -> float:
        """Forwards."""
        return float("inf") if self.max_forwards is None else self.max_forwards - spent
