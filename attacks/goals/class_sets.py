"""Goals where several classes are right at a time: a superclass, or a set of classes for each
example."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.goals.directed import ClassGoal
from ironmoe.attacks.goals.goal import Loss, described


@dataclass(frozen=True)
class _RightClasses(ClassGoal):
    """The predicted class is none of the right ones; with ``targeted`` it is one of them.

    Losses: "margin", the highest logit of a wrong class minus the highest of a right one; "ce",
    −log of the sum of the right classes' softmax.
    """

    @property
    def losses(self) -> dict[str, Loss]:
        return {"margin": self.margin, "ce": self.cross_entropy}

    @abstractmethod
    def right(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R, C) bool: the classes that are right for each example."""

    def left(self, outputs: Tensor, labels: Tensor) -> Tensor:
        predicted = self.prediction(outputs).unsqueeze(1)
        return ~self.right(outputs, labels).gather(1, predicted).squeeze(1)

    def margin(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        right = self.right(outputs, labels)
        best_right = outputs.masked_fill(~right, float("-inf")).amax(1)
        best_wrong = outputs.masked_fill(right, float("-inf")).amax(1)
        return self._directed(best_wrong - best_right)

    def cross_entropy(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,)"""
        of_right = outputs.masked_fill(~self.right(outputs, labels), float("-inf"))
        return self._directed(outputs.logsumexp(1) - of_right.logsumexp(1))


@dataclass(frozen=True)
class Superclass(_RightClasses):
    """The predicted class is of another superclass than the label: no dog taken for another dog
    counts. With ``targeted`` it is of the label's superclass.

    Labels are classes (N,) int64. Losses: "margin", the highest logit of another superclass minus
    the highest of the label's own; "ce", −log of the sum of the softmax over the label's own.

    Args:
        of: the superclass of each class, C integers: a sequence, a tensor or an array.
        targeted: the label's superclass is the one to reach.
    """

    of: Sequence[int]
    _: KW_ONLY
    targeted: bool = False

    def __post_init__(self) -> None:
        of = self.of.tolist() if hasattr(self.of, "tolist") else self.of
        if not isinstance(of, Sequence) or not all(isinstance(one, int) for one in of):
            raise TypeError(f"of must be one integer for each class, got {self.of!r}")
        if len(set(of)) < 2:
            raise ValueError(f"of must name at least two superclasses, got {self.of!r}")
        object.__setattr__(self, "of", tuple(of))

    def right(self, outputs: Tensor, labels: Tensor) -> Tensor:
        of = _tensor(tuple(self.of), outputs.device)
        return of[labels].unsqueeze(1) == of

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """ValueError: labels beyond the classes of the logits, or another number of classes."""
        super().check(outputs, labels)
        if len(self.of) != outputs.shape[1]:
            raise ValueError(
                f"of must name the superclasses of the model's {outputs.shape[1]} classes, got "
                f"{len(self.of)}"
            )


@dataclass(frozen=True)
class ClassSet(_RightClasses):
    """The predicted class is not in the example's set of right classes; with ``targeted`` it is in
    the set.

    Labels are sets (N, C), bool or 0 and 1. Each has at least one class, and not all of them.
    Losses: "margin", the highest logit outside the set minus the highest inside; "ce", −log of the
    sum of the softmax over the set.

    Args:
        targeted: the sets are classes to reach, any of them.
    """

    has_classes = False  # labels are none

    _: KW_ONLY
    targeted: bool = False

    def check_labels(self, labels: Any, count: int) -> None:
        is_table = isinstance(labels, Tensor) and labels.ndim == 2 and len(labels) == count
        if not is_table or bool(((labels != 0) & (labels != 1)).any()):
            raise TypeError(
                f"labels must be sets of classes ({count}, C), bool or 0 and 1, for {self}, got "
                f"{described(labels)}"
            )
        sizes = (labels != 0).sum(1)
        if bool(((sizes == 0) | (sizes == labels.shape[1])).any()):
            raise ValueError(
                "labels must have at least one class of each example, and not all of them, got "
                f"sets of {int(sizes.min())} to {int(sizes.max())} of {labels.shape[1]} classes"
            )

    def right(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return labels != 0

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """ValueError: sets of another number of classes than the logits have."""
        if labels.shape[1] != outputs.shape[1]:
            raise ValueError(
                f"labels must have one entry for each of the model's {outputs.shape[1]} classes, "
                f"got {tuple(labels.shape)}"
            )


@lru_cache(maxsize=64)
def _tensor(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once, since copying numbers to a GPU makes the host wait."""
    return torch.tensor(numbers, device=device)
