"""The goal of segmentation: too few pixels keep their class."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.goals.directed import DirectedGoal, margin_of_many
from ironmoe.attacks.goals.goal import Loss, described
from ironmoe.attacks.losses import cross_entropy, margin


@dataclass(frozen=True)
class Segmentation(DirectedGoal):
    """The share of pixels whose class is right falls below ``share``; with ``targeted`` labels are
    the map to reach, and at least ``share`` of the pixels must have its classes.

    Outputs are logits (N, C, …), labels int64 (N, …): (N, H, W) for images, (N, L) for sequences or
    for several heads with the same classes. The figure is the share of right pixels; it is 1 for an
    example without pixels that count.

    Losses (each a mean over the pixels that count):

    - "margin" is above 0 where the goal is reached, and then what the best pixels, so many as are
      needed, have beyond their boundaries at least; below 0 it is the mean of what they lack.
    - "ce" is the cross-entropy.
    - "masked_ce" is the cross-entropy of the pixels that are still right (with ``targeted``: not
      yet), 0 for others, so that those which are done take no more of the gradient (Croce et al.,
      arXiv 2306.12941, section 3.1; SegPGD, arXiv 2207.12391, weighs the two kinds).
    - "js" is the Jensen–Shannon divergence of the softmax from the label (arXiv 2306.12941), which
      fades for pixels that are far beyond their boundary.

    Args:
        share: above 0 and at most 1. 1: a single wrong pixel is a success; 1e-9: all must be wrong.
        ignore_index: pixels with this label do not count; None: all do. Many data sets have 255.
        targeted: see above.
    """

    share: float
    _: KW_ONLY
    ignore_index: int | None = None
    targeted: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.share, int | float) and 0 < self.share <= 1):
            raise ValueError(f"share must be above 0 and at most 1, got {self.share!r}")
        if not (self.ignore_index is None or isinstance(self.ignore_index, int)):
            raise TypeError(f"ignore_index must be an int or None, got {self.ignore_index!r}")

    @property
    def losses(self) -> dict[str, Loss]:
        return {
            "margin": self.margin,
            "ce": self.cross_entropy,
            "masked_ce": self.masked_cross_entropy,
            "js": self.jensen_shannon,
        }

    @property
    def usual_loss(self) -> str:
        return "ce" if self.targeted else "js"

    def left(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.figure(outputs, labels) < self.share

    def figure(self, outputs: Tensor, labels: Tensor) -> Tensor:
        counts = self._counts(labels)
        right = ((outputs.argmax(1) == labels).flatten(1) & counts).sum(1)
        total = counts.sum(1)
        return torch.where(total > 0, right.double() / total.clamp_min(1), 1.0)

    def check_labels(self, labels: Any, count: int) -> None:
        super().check_labels(labels, count)
        if labels.dtype != torch.int64 or labels.ndim < 2:
            raise TypeError(
                f"labels must be an int64 tensor ({count}, H, W) for {self}, got "
                f"{described(labels)}"
            )

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """ValueError: labels of other pixels than the outputs, or beyond their classes."""
        shape = tuple(outputs.shape)
        if outputs.ndim < 3 or shape[1] < 2:
            raise ValueError(
                f"model must return logits (N, C, …) with at least 2 classes for {self}, got "
                f"{shape}; MultiLabel takes one logit a pixel"
            )
        if tuple(labels.shape) != (shape[0], *shape[2:]):
            raise ValueError(
                f"labels must have shape {(shape[0], *shape[2:])} for outputs {shape}, got "
                f"{tuple(labels.shape)}"
            )
        classes = labels.flatten(1)[self._counts(labels)]
        if len(classes) and (int(classes.min()) < 0 or int(classes.max()) >= shape[1]):
            wrong = int(classes.min()) if int(classes.min()) < 0 else int(classes.max())
            raise ValueError(
                f"labels must be from 0 to {shape[1] - 1} for the model's {shape[1]} classes, or "
                f"ignore_index={self.ignore_index}, got {wrong}"
            )

    def margin(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        counts = self._counts(labels)
        total = counts.sum(1)
        enough = (self.share * total.double()).ceil().long()  # right pixels, but for rounding
        enough = torch.where((enough - 1).double() / total >= self.share, enough - 1, enough)
        enough = torch.where(enough.double() / total < self.share, enough + 1, enough)
        needed = enough if self.targeted else total - enough + 1
        return margin_of_many(self._gains(outputs, labels), counts, needed.clamp_min(1))

    def cross_entropy(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        return self._mean(self._cross_entropies(outputs, labels), labels)

    def masked_cross_entropy(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        is_open = (outputs.argmax(1) == labels).flatten(1) != self.targeted
        return self._mean(torch.where(is_open, self._cross_entropies(outputs, labels), 0), labels)

    def jensen_shannon(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        log_p = -cross_entropy(outputs, self._classes(labels)).flatten(1)
        p = log_p.exp()
        # Of the softmax and the label only the label's class is in both: with p its probability,
        # twice the divergence is log 4 + p log p − (1 + p) log(1 + p).
        twice = 2 * math.log(2) + p * log_p - (1 + p) * p.log1p()
        return self._mean(self._directed(twice / 2), labels)

    def _cross_entropies(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R, M)"""
        return self._directed(cross_entropy(outputs, self._classes(labels)).flatten(1))

    def _gains(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R, M) how far each pixel is beyond the boundary of its label's class: to be wrong or,
        with ``targeted``, right."""
        return self._directed(margin(outputs, self._classes(labels)).flatten(1))

    def _mean(self, values: Tensor, labels: Tensor) -> Tensor:
        """(R,) over the pixels that count."""
        counts = self._counts(labels)
        return torch.where(counts, values, 0).sum(1) / counts.sum(1).clamp_min(1)

    def _counts(self, labels: Tensor) -> Tensor:
        """(R, M) bool."""
        flat = labels.flatten(1)
        return (
            torch.ones_like(flat, dtype=torch.bool)
            if self.ignore_index is None
            else (flat != self.ignore_index)
        )

    def _classes(self, labels: Tensor) -> Tensor:
        """The labels, with class 0 where pixels do not count."""
        return (
            labels
            if self.ignore_index is None
            else labels.masked_fill(labels == self.ignore_index, 0)
        )
