"""Training on the images as they are: what every other method is compared with."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ironmoe.attacks.training.method import Strength, TrainingMethod
from ironmoe.attacks.training.registry import register_training_method


@register_training_method(
    "standard",
    summary="Cross-entropy of the images as they are.",
    cost="3",
    source="",
    ignores=("steps", "alpha", "mode", "routing"),
)
class Standard(TrainingMethod):
    """CE(x), no attack. It takes the arguments of ``TrainingMethod``, so that a loop may use any
    method; those of the attack mean nothing here. Without ``eps`` it is the range of the pixels."""

    def __init__(self, model: nn.Module, eps: float | None = None, **options: Any) -> None:
        super().__init__(model, _width(options) if eps is None else eps, **options)

    def _attack(self, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
        return images.detach()

    def _losses(self, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        logits = self._logits(points, images)
        loss = self._cross_entropy(logits, labels)
        self._keep("clean_correct", logits, labels)
        return loss


def _width(options: Mapping[str, Any]) -> float:
    """Of the range of the pixels; 1 where they have none, or where it is no range, which the method
    refuses."""
    low, high = options.get("bounds") or (0.0, 1.0)
    return high - low if 0 < high - low < math.inf else 1.0
