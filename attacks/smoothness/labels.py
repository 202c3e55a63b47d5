"""The labels that measurements take: one class an image."""

from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.goals.goal import described
from ironmoe.attacks.goals.labels import label_advice


def check_labels(labels: Any, count: int) -> None:
    """TypeError: they are neither None nor ``count`` classes, int64."""
    if labels is None:
        return
    is_tensor = isinstance(labels, Tensor) and labels.dtype == torch.int64
    if not is_tensor or labels.shape != (count,):
        raise TypeError(
            f"labels must be an int64 tensor ({count},) or None, got {described(labels)}"
            + label_advice(labels, count)
        )


def right_classes(labels: Tensor | None, logits: Tensor) -> Tensor:
    """(B,) int64 on the device of the logits (B, C), the model's own classes where none are given.
    ValueError: one is no class."""
    if labels is None:
        return logits.argmax(1)
    labels = labels.to(logits.device)
    classes = logits.shape[1]
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, got {int(labels.min())} … {int(labels.max())}"
        )
    return labels
