"""The expected accuracy of one pass of a random model, with an interval that knows the passes."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ironmoe.attacks.evaluation.proportion import wilson


@dataclass(frozen=True, eq=False, repr=False)
class ExpectedAccuracy:
    """The share of right answers of a model that answers each time anew.

    right: (N,) int64, how many of the passes over each image were right
    passes: how many there were of each
    alike: how many times as much a pass varies as one whose images draw for themselves; above 1 for
        a model that draws once for a whole batch
    """

    right: Tensor
    passes: int
    alike: float = 1.0

    @property
    def total(self) -> int:
        """How many images."""
        return len(self.right)

    @property
    def count(self) -> float:
        """How many images a pass gets right, on average."""
        return float(self.right.sum()) / self.passes

    @property
    def value(self) -> float:
        """The expected accuracy of a pass; NaN without images."""
        return self.count / self.total if self.total else float("nan")

    @property
    def least(self) -> "ExpectedAccuracy":
        """This one, as of every accuracy that is known; an ``AccuracyRange`` has two ends."""
        return self

    @property
    def most(self) -> "ExpectedAccuracy":
        """This one."""
        return self

    @property
    def undecided(self) -> int:
        """How many images are undecided: none."""
        return 0

    def without(self, images: int) -> "ExpectedAccuracy":
        """The accuracy that is left if the model fails in every pass over so many more images,
        those that it is right about most often."""
        right = self.right.clone()
        right[right.argsort(descending=True, stable=True)[:images]] = 0
        return ExpectedAccuracy(right, self.passes, self.alike)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """For the mean over all images that could have been drawn, and over all passes.

        Wilson's score interval (Wilson 1927) for as many independent trials as the images and
        passes are worth (Korn & Graubard 1998): p (1 − p) over the variance of the mean. That
        variance is the one between the images' shares, over N. If each image is always right or
        always wrong, this makes N trials; if all images are alike, N · passes. Where a pass draws
        for all its images at once, the passes vary more than the images show, and ``alike`` adds
        what is missing.
        """
        trials = max(1, round(self._worth())) if self.total else 0
        return wilson(self.value, trials, confidence)

    def _worth(self) -> float:
        """How many independent trials have the variance that the mean has."""
        share = self.right.double() / self.passes
        if self.total < 2:
            return float(self.total)
        spread = float(share.var())
        alone = self.value * (1 - self.value)
        within = float((share * (1 - share)).mean())
        variance = spread + (self.alike - 1) * within / self.passes
        if variance <= 0:
            return float(self.total)
        return min(max(alone / variance * self.total, 1.0), float(self.total * self.passes))

    def as_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "total": self.total,
            "passes": self.passes,
            "value": self.value,
            "interval_95": list(self.interval()),
        }

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

    def __repr__(self) -> str:
        return f"ExpectedAccuracy({self}, total={self.total}, passes={self.passes})"
