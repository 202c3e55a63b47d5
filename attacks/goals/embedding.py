"""The goal of embeddings, such as those of faces: a point too far from its reference."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from torch import Tensor

from ironmoe.attacks.goals.directed import DirectedGoal
from ironmoe.attacks.goals.distances import difference, length, unit
from ironmoe.attacks.goals.goal import Loss, described

METRICS = ("cosine", "l2")


@dataclass(frozen=True)
class EmbeddingDistance(DirectedGoal):
    """The embedding is farther than ``distance`` from the reference, so that nobody is recognised;
    with ``targeted`` it is at most so far from it: someone is taken for the owner of the reference.

    Outputs are embeddings (N, D), labels references (N, D). The figure is the distance. The loss
    "margin" is, for "l2", the distance beyond ``distance``, and with ``targeted`` what it is below
    it. For "cosine" it is the same of the Euclidean distances of the embeddings at length 1: they
    grow with the cosine distance, and have a slope where it is 0.

    Args:
        distance: at least 0; for "cosine" below 2.
        metric: "cosine", 1 − cos of the angle, from 0 to 2; "l2", the Euclidean distance.
        targeted: see above.
    """

    distance: float
    _: KW_ONLY
    metric: Literal["cosine", "l2"] = "cosine"
    targeted: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {self.metric!r}")
        most = 2 if self.metric == "cosine" else math.inf
        if not (isinstance(self.distance, int | float) and 0 <= self.distance < most):
            raise ValueError(
                f"distance must be a number, at least 0 and below {most} for {self.metric!r}, got "
                f"{self.distance!r}"
            )

    @property
    def losses(self) -> dict[str, Loss]:
        return {"margin": self.margin}

    def left(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.figure(outputs, labels) > self.distance

    def figure(self, outputs: Tensor, labels: Tensor) -> Tensor:
        here, there = outputs.double(), labels.double()
        if self.metric == "l2":
            return (here - there).norm(dim=1)
        return 1 - (unit(here) * unit(there)).sum(1)

    def check_labels(self, labels: Any, count: int) -> None:
        super().check_labels(labels, count)
        if labels.ndim != 2 or not labels.is_floating_point():
            raise TypeError(
                f"labels must be float embeddings ({count}, D) for {self}, got {described(labels)}"
            )
        is_zero = (labels == 0).all(1) & (self.metric == "cosine")
        if bool((is_zero | ~labels.isfinite().all(1)).any()):
            raise ValueError(
                f"labels must be finite and, for 'cosine', not 0 everywhere, for {self}"
            )

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """ValueError: references of another shape than the embeddings."""
        if labels.shape != outputs.shape:
            raise ValueError(
                f"labels must have the shape of the model's embeddings {tuple(outputs.shape)}, got "
                f"{tuple(labels.shape)}"
            )

    def margin(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        labels = labels.to(outputs.dtype)
        if self.metric == "l2":
            return self._directed(length(difference(outputs, labels)) - self.distance)
        # Its square is twice the cosine distance.
        chord = length(difference(unit(outputs), unit(labels)))
        return self._directed(chord - math.sqrt(2 * self.distance))
