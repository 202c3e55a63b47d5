"""The goal of top-k accuracy: the label is not among the k likeliest classes, or is."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ironmoe.attacks.goals.directed import ClassGoal, margin_of_many
from ironmoe.attacks.goals.goal import Loss
from ironmoe.attacks.losses import cross_entropy


@dataclass(frozen=True)
class TopK(ClassGoal):
    """The label is not among the ``k`` highest logits; with ``targeted`` it is among them.

    Of equal logits that of the lower class comes first. The figure is the rank of the label, 1 for
    the highest logit.

    Losses: "margin", which is above 0 where the label is out, and then the k-th best other logit
    minus the label's; below 0 it is the mean of what the k best others lack. "ce" is the
    cross-entropy.

    Args:
        k: at least 1, and below the number of classes.
        targeted: the label is the class to bring among the k highest.
    """

    k: int
    _: KW_ONLY
    targeted: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k must be an int, at least 1, got {self.k!r}")

    @property
    def losses(self) -> dict[str, Loss]:
        return {"margin": self.margin, "ce": self.cross_entropy}

    def left(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return _rank(outputs, labels) > self.k

    def figure(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return _rank(outputs, labels).double()

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """ValueError: labels beyond the classes of the logits, or no more classes than k."""
        super().check(outputs, labels)
        if self.k >= outputs.shape[1]:
            raise ValueError(
                f"k must be below the model's {outputs.shape[1]} classes, got {self.k}"
            )

    def margin(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,) of k classes above the label, or with ``targeted`` of all but k − 1 below it."""
        label = labels.unsqueeze(1)
        others = torch.ones_like(outputs, dtype=torch.bool).scatter(1, label, False)
        gains = self._directed(outputs - outputs.gather(1, label))
        needed = outputs.shape[1] - self.k if self.targeted else self.k
        return margin_of_many(gains, others, torch.full_like(labels, needed))

    def cross_entropy(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        return self._directed(cross_entropy(outputs, labels))


def _rank(logits: Tensor, labels: Tensor) -> Tensor:
    """(R,) int64, the place of the label among the classes, from 1."""
    label = labels.unsqueeze(1)
    own = logits.gather(1, label)
    classes = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (classes < label))
    return 1 + before.sum(1)
