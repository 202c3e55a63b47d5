"""Losses an attack raises: (logits (B, C), labels (B,)) → (B,), one value an example; targeted ones
are given (B,) targets, too."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
AnyLoss = TypeVar("AnyLoss", Loss, TargetedLoss)

TINY = 1e-12  # of a difference of logits; keeps 0 / 0 out where all are equal


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(logits)[label]."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The best wrong logit minus the right one, above 0 exactly when misclassified (Carlini &
    Wagner, arXiv 1608.04644)."""
    right = logits.gather(1, labels.unsqueeze(1))
    wrong = logits.scatter(1, labels.unsqueeze(1), float("-inf")).amax(1)
    return wrong - right.squeeze(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein, arXiv 2003.01690, sec. 4): the margin over z₁ − z₃,
    z₁ ≥ z₂ ≥ … the sorted logits.

    The same for logits multiplied or shifted by a number: unlike the cross-entropy's, its gradient
    does not vanish where a model is very sure.

    Raises:
        ValueError: fewer than 3 classes.
    """
    _check_classes(logits, 3, "dlr", "margin")
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + TINY)


def sigmoid_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropies of all classes, summed: of models trained to tell each class by
    itself."""
    targets = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits, targets, reduction="none"
    ).sum(1)


def targeted_cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target]."""
    return -cross_entropy(logits, targets)


def targeted_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The target's logit minus the right one; above 0 the example is misclassified."""
    difference: Tensor = logits.gather(1, targets.unsqueeze(1)) - logits.gather(
        1, labels.unsqueeze(1)
    )
    return difference.squeeze(1)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted DLR (arXiv 2003.01690, sec. 4): the targeted margin over z₁ − (z₃ + z₄) / 2, z₁ ≥ z₂
    ≥ … the sorted logits.

    Raises:
        ValueError: fewer than 4 classes.
    """
    _check_classes(logits, 4, "targeted_dlr", "targeted_margin")
    top = logits.topk(4, dim=1).values
    return targeted_margin(logits, labels, targets) / (
        top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + TINY
    )


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
    "sigmoid": sigmoid_cross_entropy,
}
TARGETED_LOSSES: dict[str, TargetedLoss] = {
    "ce": targeted_cross_entropy,
    "margin": targeted_margin,
    "dlr": targeted_dlr,
}


def get_loss(loss: str | Loss) -> Loss:
    """A loss by name, or the callable itself."""
    return _named(loss, LOSSES)


def get_targeted_loss(loss: str | TargetedLoss) -> TargetedLoss:
    """A targeted loss by name, or the callable itself."""
    return _named(loss, TARGETED_LOSSES)


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
