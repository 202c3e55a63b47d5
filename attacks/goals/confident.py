"""The goal of an error that is sure of itself: another class wins by a margin."""

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from ironmoe.attacks.goals.directed import ClassGoal
from ironmoe.attacks.goals.goal import Loss
from ironmoe.attacks.losses import cross_entropy, margin


@dataclass(frozen=True)
class Confident(ClassGoal):
    """The model names another class than the label, with a logit that is higher than the label's by
    at least ``margin`` (κ of Carlini & Wagner, arXiv 1608.04644, section VI-C). With ``targeted``
    it names the label, by as much before any other class.

    The figure is the highest other logit minus the label's. Losses: "margin", the figure (with
    ``targeted`` its negative) minus ``margin``; "ce", the cross-entropy.

    Args:
        margin: at least 0, in units of the logits.
        targeted: the label is the class to reach.
    """

    margin: float
    _: KW_ONLY
    targeted: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.margin, int | float) and 0 <= self.margin < float("inf")):
            raise ValueError(f"margin must be a number, at least 0, got {self.margin!r}")

    @property
    def losses(self) -> dict[str, Loss]:
        return {"margin": self.margin_beyond, "ce": self.cross_entropy}

    def left(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return ~self.reached(outputs, labels) if self.targeted else self.reached(outputs, labels)

    def reached(self, outputs: Tensor, labels: Tensor) -> Tensor:
        wins = self._directed(margin(outputs.double(), labels)) >= self.margin
        names_label = self.prediction(outputs) == labels
        return wins & (names_label if self.targeted else ~names_label)

    def figure(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return margin(outputs.double(), labels)

    def margin_beyond(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        return self._directed(margin(outputs, labels)) - self.margin

    def cross_entropy(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        return self._directed(cross_entropy(outputs, labels))
