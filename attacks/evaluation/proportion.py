"""A share with its confidence interval."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any


@dataclass(frozen=True)
class Proportion:
    """``count`` of ``total`` independent trials."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """The share; NaN if ``total`` is 0."""
        return self.count / self.total if self.total else float("nan")

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson score interval (Wilson 1927): honest for small samples and for shares near 0 and
        1."""
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
        if self.total == 0:
            return 0.0, 1.0
        z = NormalDist().inv_cdf(0.5 + confidence / 2)
        n, p = self.total, self.value
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
        low = 0.0 if self.count == 0 else max(0.0, center - half)
        return low, 1.0 if self.count == n else min(1.0, center + half)

    def as_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "total": self.total,
            "value": self.value,
            "wilson_95": list(self.interval()),
        }

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
