"""Losses an attack raises: (logits (B, C), labels (B,)) → (B,), one value an example."""

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(logits)[label]."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The best wrong logit minus the right one, above 0 exactly when misclassified (Carlini & Wagner, arXiv 1608.04644)."""
    right = logits.gather(1, labels.unsqueeze(1))
    wrong = logits.scatter(1, labels.unsqueeze(1), float("-inf")).amax(1)
    return wrong - right.squeeze(1)


def sigmoid_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropies of all classes, summed: of models trained to tell each class by itself."""
    targets = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "sigmoid": sigmoid_cross_entropy}


def get_loss(loss: str | Loss) -> Loss:
    """A loss by name, or the callable itself."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {tuple(LOSSES)} or a callable, got {loss!r}")
    return LOSSES[loss]
