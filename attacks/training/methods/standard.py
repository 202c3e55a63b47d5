"""Training on the images as they are: what every other method is compared with."""

from typing import Any

from torch import Tensor, nn

from ironmoe.attacks.training.method import Strength, TrainingMethod
from ironmoe.attacks.training.registry import register_training_method


@register_training_method(
    "standard",
    summary="Cross-entropy of the images as they are.",
    cost="3",
    source="",
)
class Standard(TrainingMethod):
    """CE(x), no attack. It takes the arguments of ``TrainingMethod``, so that a loop may use any
    method; those of the attack mean nothing here."""

    def __init__(self, model: nn.Module, eps: float = 1.0, **options: Any) -> None:
        super().__init__(model, eps, **options)

    def _attack(self, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
        return images.detach()

    def _losses(self, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        logits = self._logits(points, images)
        loss = self._cross_entropy(logits, labels)
        self._keep("clean_correct", logits, labels)
        return loss
