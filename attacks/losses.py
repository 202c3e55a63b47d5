"""The losses that attacks raise, and the table of their names.

A loss takes logits (B, C) and labels (B,) and gives (B,), one value an example. A targeted one is
given targets (B,), too, and rises with the logit of the target.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
AnyLoss = TypeVar("AnyLoss", Loss, TargetedLoss)

# DLR divides by a difference of logits plus this number, so that equal logits give no 0 / 0.
LEAST_DIFFERENCE = 1e-12
# DLR compares so many of the highest logits with each other.
DLR_CLASSES = 3
TARGETED_DLR_CLASSES = 4


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(logits)[label]."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The best wrong logit minus the right one (Carlini & Wagner, arXiv 1608.04644). It is above 0
    exactly where an example is misclassified."""
    right = logits.gather(1, labels.unsqueeze(1))
    wrong = logits.scatter(1, labels.unsqueeze(1), float("-inf")).amax(1)
    return wrong - right.squeeze(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein, arXiv 2003.01690, sec. 4): the margin over z₁ − z₃,
    z₁ ≥ z₂ ≥ … the sorted logits.

    Multiplying the logits by a number, or adding one, does not change it. So its gradient does not
    vanish where a model is very sure, as that of the cross-entropy does.

    Raises:
        ValueError: fewer than 3 classes.
    """
    _check_classes(logits, DLR_CLASSES, "dlr", "margin")
    top = logits.topk(DLR_CLASSES, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + LEAST_DIFFERENCE)


def sigmoid_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the binary cross-entropies of all classes: for models that are trained to tell
    each class by itself."""
    targets = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits, targets, reduction="none"
    ).sum(1)


def targeted_cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target]."""
    return -cross_entropy(logits, targets)


def targeted_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The target's logit minus the right one. Above 0 the example is misclassified."""
    target = logits.gather(1, targets.unsqueeze(1))
    right = logits.gather(1, labels.unsqueeze(1))
    return (target - right).squeeze(1)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted DLR (arXiv 2003.01690, sec. 4): the targeted margin over z₁ − (z₃ + z₄) / 2, z₁ ≥ z₂
    ≥ … the sorted logits.

    Raises:
        ValueError: fewer than 4 classes.
    """
    _check_classes(logits, TARGETED_DLR_CLASSES, "targeted_dlr", "targeted_margin")
    top = logits.topk(TARGETED_DLR_CLASSES, dim=1).values
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + LEAST_DIFFERENCE
    return targeted_margin(logits, labels, targets) / scale


class NamedLoss(NamedTuple):
    """A loss under its name, without a target and with one (None: it has no targeted form), and the
    fewest classes that each of the two makes sense for."""

    plain: Loss
    targeted: TargetedLoss | None
    plain_classes: int = 2
    targeted_classes: int = 2


LOSSES: dict[str, NamedLoss] = {
    "ce": NamedLoss(cross_entropy, targeted_cross_entropy),
    "margin": NamedLoss(margin, targeted_margin),
    "dlr": NamedLoss(dlr, targeted_dlr, DLR_CLASSES, TARGETED_DLR_CLASSES),
    "sigmoid": NamedLoss(sigmoid_cross_entropy, None),
}
"""Every loss that an attack takes by name."""


def get_loss(loss: str | Loss) -> Loss:
    """A loss by name, or the callable itself.

    Raises:
        ValueError: there is no loss of this name.
    """
    return _named(loss, {name: entry.plain for name, entry in LOSSES.items()})


def get_targeted_loss(loss: str | TargetedLoss) -> TargetedLoss:
    """A targeted loss by name, or the callable itself.

    Raises:
        ValueError: there is no loss of this name, or it has no targeted form.
    """
    return _named(loss, {name: entry.targeted for name, entry in LOSSES.items() if entry.targeted})


def least_classes(loss: Loss | TargetedLoss) -> int:
    """The fewest classes that a loss makes sense for; 2 for one that is not in the table."""
    for entry in LOSSES.values():
        if loss is entry.plain:
            return entry.plain_classes
        if loss is entry.targeted:
            return entry.targeted_classes
    return 2


def _named(loss: str | AnyLoss, losses: Mapping[str, AnyLoss]) -> AnyLoss:
    if callable(loss):
        return loss
    if loss not in losses:
        raise ValueError(f"loss must be one of {tuple(losses)} or a callable, got {loss!r}")
    return losses[loss]


def _check_classes(logits: Tensor, least: int, name: str, alternative: str) -> None:
    if logits.shape[1] < least:
        raise ValueError(
            f"{name} needs at least {least} classes, got logits of {logits.shape[1]}; use "
            f"{alternative!r}"
        )
