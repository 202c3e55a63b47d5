"""A share with its confidence interval."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any


def wilson(share: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval around a share of so many independent trials.

    Raises:
        ValueError: ``confidence`` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * ((share * (1 - share) + z * z / (4 * trials)) / trials) ** 0.5
    half = half / (1 + z * z / trials)
    low = 0.0 if share == 0 else max(0.0, center - half)
    return low, 1.0 if share == 1 else min(1.0, center + half)


@dataclass(frozen=True)
class Proportion:
    """``count`` of ``total`` independent trials."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """The share; NaN if ``total`` is 0."""
        return self.count / self.total if self.total else float("nan")

    @property
    def least(self) -> "Proportion":
        """This one, as of every accuracy that is known; an ``AccuracyRange`` has two ends."""
        return self

    @property
    def most(self) -> "Proportion":
        """This one."""
        return self

    @property
    def undecided(self) -> int:
        """How many images are undecided: none."""
        return 0

    def without(self, images: int) -> "Proportion":
        """The share that is left if so many more of the trials fail."""
        return Proportion(self.count - images, self.total)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson score interval (Wilson 1927): honest for small samples and for shares near 0 and
        1."""
        return wilson(self.value, self.total, confidence)

    def as_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "total": self.total,
            "value": self.value,
            "wilson_95": list(self.interval()),
        }

    def __str__(self) -> str:
        low, high = self.interval()
        share = f"{100 * self.value:.1f} %" if self.total else "–"
        return f"{share} [{100 * low:.1f}, {100 * high:.1f}]"
