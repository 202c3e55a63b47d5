"""The goal of regression: numbers that are off by more than a tolerance."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ironmoe.attacks.goals.directed import DirectedGoal
from ironmoe.attacks.goals.distances import difference, length
from ironmoe.attacks.goals.goal import Loss, described

MEASURES = ("max", "mean", "l2")


@dataclass(frozen=True)
class Regression(DirectedGoal):
    """The error is above ``tolerance``; with ``targeted`` labels are values to reach, and the error
    must be at most ``tolerance``.

    Outputs are numbers (N, …), labels numbers of the same shape, but for axes of length 1: a model
    that returns (N, 1) goes with labels (N,). The figure is the error, and the loss "margin" the
    error minus the tolerance, or with ``targeted`` the tolerance minus the error.

    Args:
        tolerance: at least 0, in units of the outputs.
        measure: what the error is of the differences between outputs and labels: "max", the largest
            absolute one; "mean", the mean absolute one; "l2", the Euclidean length of all.
        targeted: see above.
    """

    tolerance: float
    _: KW_ONLY
    measure: Literal["max", "mean", "l2"] = "max"
    targeted: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.tolerance, int | float) and 0 <= self.tolerance < float("inf")):
            raise ValueError(f"tolerance must be a number, at least 0, got {self.tolerance!r}")
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {MEASURES}, got {self.measure!r}")

    @property
    def losses(self) -> dict[str, Loss]:
        return {"margin": self.margin}

    def left(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.figure(outputs, labels) > self.tolerance

    def figure(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self._error(_flat(outputs).double() - _flat(labels).double())

    def check_labels(self, labels: Any, count: int) -> None:
        super().check_labels(labels, count)
        if labels.dtype == torch.bool or labels.is_complex() or not bool(labels.isfinite().all()):
            raise ValueError(
                f"labels must be finite numbers for {self}, got {described(labels)}"
                + (" with NaN or infinity" if labels.is_floating_point() else "")
            )

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """ValueError: labels of another shape than the outputs."""
        if _shape(labels) != _shape(outputs):
            raise ValueError(
                f"labels must have the shape of the model's outputs {tuple(outputs.shape)}, got "
                f"{tuple(labels.shape)}"
            )

    def margin(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        apart = difference(_flat(outputs), _flat(labels.to(outputs.dtype)))
        return self._directed(self._error(apart) - self.tolerance)

    def _error(self, apart: Tensor) -> Tensor:
        """(R,) of differences (R, D). Where one is 0 its slope is 1, so that a search may begin
        there."""
        if self.measure == "l2":
            return length(apart)
        absolute = torch.where(apart < 0, -apart, apart)
        return absolute.amax(1) if self.measure == "max" else absolute.mean(1)


def _flat(values: Tensor) -> Tensor:
    """(R, D)"""
    return values.unsqueeze(-1).flatten(1)


def _shape(values: Tensor) -> tuple[int, ...]:
    """Of an example, without axes of length 1."""
    return tuple(size for size in values.shape[1:] if size != 1)
