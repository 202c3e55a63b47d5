"""The goal for several labels an example, each of which is there or not."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.goals.directed import DirectedGoal, margin_of_many
from ironmoe.attacks.goals.goal import Loss, described

UNKNOWN = -1


@dataclass(frozen=True)
class MultiLabel(DirectedGoal):
    """At least ``wrong`` labels of an example are wrong: by default, the predicted set is not the
    right one. Or the set of those that are there is too unlike the right one (``jaccard``).

    Outputs are logits (N, …) of any shape, one for each label: a label is predicted to be there if
    its logit is above ``threshold``. Labels (N, …) have the same shape and are bool, or 0 and 1; −1
    stands for a label that is not known and does not count. So it is the goal of segmentation with
    a single class, too: one logit a pixel.

    The figure is the share of right labels; with ``jaccard``, the Jaccard index (intersection over
    union) of the predicted and the right set, 1 if both are empty.

    Losses: "margin" (not with ``jaccard``) is above 0 where the goal is reached, and then what the
    best ``wrong`` labels are beyond the threshold at least; below 0 it is the mean of what they
    lack. "hinge" is 0 if all labels are wrong, and else the mean over labels of what the right ones
    lack to be wrong. "bce" is the mean binary cross-entropy.

    Args:
        wrong: how many labels must be wrong, at least 1.
        jaccard: in place of ``wrong``: the Jaccard index must fall below this, above 0 and at most
            1.
        threshold: in units of the outputs: 0 for logits, 0.5 for probabilities.
        targeted: labels are the set to reach: success means that fewer than ``wrong`` are wrong, or
            that the Jaccard index is at least ``jaccard``.
    """

    _: KW_ONLY
    wrong: int = 1
    jaccard: float | None = None
    threshold: float = 0.0
    targeted: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.wrong, int) or self.wrong < 1:
            raise ValueError(f"wrong must be an int, at least 1, got {self.wrong!r}")
        if self.jaccard is not None and not 0 < self.jaccard <= 1:
            raise ValueError(
                f"jaccard must be above 0 and at most 1, or None, got {self.jaccard!r}"
            )
        if self.jaccard is not None and self.wrong != 1:
            raise ValueError(
                f"wrong must be left out where jaccard is given, got {self.wrong!r} with "
                f"jaccard={self.jaccard!r}"
            )

    @property
    def losses(self) -> dict[str, Loss]:
        losses: dict[str, Loss] = {"margin": self.margin} if self.jaccard is None else {}
        return losses | {"hinge": self.hinge, "bce": self.binary_cross_entropy}

    @property
    def usual_loss(self) -> str:
        return "margin" if self.jaccard is None else "bce"

    def left(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.jaccard is not None:
            return self.figure(outputs, labels) < self.jaccard
        return self._is_wrong(outputs, labels).sum(1) >= self.wrong

    def figure(self, outputs: Tensor, labels: Tensor) -> Tensor:
        known, there = _known(labels), _there(labels)
        if self.jaccard is None:
            return 1 - self._is_wrong(outputs, labels).sum(1).double() / known.sum(1)
        predicted = (outputs.flatten(1) > self.threshold) & known
        union = (predicted | there).sum(1).double()
        both = (predicted & there).sum(1)
        return torch.where(union > 0, both / union, 1.0)

    def check_labels(self, labels: Any, count: int) -> None:
        super().check_labels(labels, count)
        if labels.ndim < 2:
            raise TypeError(
                f"labels must be a tensor ({count}, L) for {self}, got {described(labels)}"
            )
        if labels.dtype != torch.bool:
            values = (labels == 0) | (labels == 1) | (labels == UNKNOWN)
            if not bool(values.all()):
                raise ValueError(
                    f"labels must be 0, 1 or −1 (not known) for {self}, got "
                    f"{labels[~values][0].item()}"
                )
        fewest = int(_known(labels).sum(1).min()) if count else self.wrong
        if fewest < self.wrong:
            raise ValueError(
                f"labels must have at least wrong={self.wrong} that are known for each example, "
                f"got one with {fewest}"
            )

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """ValueError: labels of another shape than the outputs."""
        if labels.shape != outputs.shape:
            raise ValueError(
                f"labels must have the shape of the model's outputs {tuple(outputs.shape)}, got "
                f"{tuple(labels.shape)}"
            )

    def margin(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,) of ``wrong`` labels to be wrong, or with ``targeted`` of all others to be right."""
        known = _known(labels)
        needed = torch.full_like(known[:, 0], self.wrong, dtype=torch.int64)
        if self.targeted:
            needed = known.sum(1) - self.wrong + 1
        return margin_of_many(self._gains(outputs, labels), known, needed)

    def hinge(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        return _mean(self._gains(outputs, labels).clamp_max(0), _known(labels))

    def binary_cross_entropy(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        logits = outputs.flatten(1) - self.threshold
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, _there(labels).to(logits.dtype), reduction="none"
        )
        return self._directed(_mean(each, _known(labels)))

    def _gains(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R, L) how far each label is beyond the threshold: to be wrong or, with ``targeted``,
        right."""
        beyond = outputs.flatten(1) - self.threshold
        return self._directed(torch.where(_there(labels), -beyond, beyond))

    def _is_wrong(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R, L) bool."""
        return ((outputs.flatten(1) > self.threshold) != _there(labels)) & _known(labels)


def _known(labels: Tensor) -> Tensor:
    """(R, L) bool."""
    return labels.flatten(1) >= 0


def _there(labels: Tensor) -> Tensor:
    """(R, L) bool."""
    return labels.flatten(1) > 0


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """(R,) over the entries that count."""
    return torch.where(counts, values, 0).sum(1) / counts.sum(1)
