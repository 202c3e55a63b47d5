"""MART (Wang et al., ICLR 2020): images that the model tells wrong weigh more."""

from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.attacks.training.checks import check_factor, check_labels
from ironmoe.attacks.training.inner.attacks import kl_divergence, pgd
from ironmoe.attacks.training.method import Strength, TrainingMethod
from ironmoe.attacks.training.registry import register_training_method

# From the official code; without them both terms may end at 0 or infinity in float32.
MARGIN_TOP = 1.0001
WEIGHT_TOP = 1.0000001


@register_training_method(
    "mart",
    summary="Cross-entropy of attacked images with a margin, plus β times a divergence that counts "
    "more for images told wrong.",
    cost="2n + 6",
    source="ICLR 2020",
    takes=("beta",),
)
class MART(TrainingMethod):
    """BCE(x′) + β · mean KL(p(x) ‖ p(x′)) · (1 − p_y(x)), where BCE(x′) = CE(x′) − log(1 − the
    largest p_j(x′) of another class), x′ by PGD on the cross-entropy from x + N(0, 0.001²).

    Labels must be classes (B,) int64.

    Args (beyond those of ``TrainingMethod``):
        beta: β; 5 in the paper, 6 in some of its runs.
    """

    def __init__(self, model: nn.Module, eps: float, *, beta: float = 5.0, **options: Any) -> None:
        super().__init__(model, eps, **options)
        check_factor(beta=beta)
        self.beta = float(beta)

    def _attack(self, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
        return pgd(
            self.inner,
            images,
            labels,
            eps=strength.eps,
            alpha=strength.alpha,
            steps=self.steps,
            start="normal",
        )

    def _losses(self, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        if labels.is_floating_point():
            raise TypeError(f"labels must be int64 classes (B,) for MART, got {labels.dtype}")
        clean_logits = self._logits(images, images)
        logits = self._logits(points, images)
        check_labels(logits, labels)
        label_B1 = labels[:, None]
        self._keep("clean_correct", clean_logits, labels)
        self._keep("adversarial_correct", logits, labels)

        others = logits.softmax(1).scatter(1, label_B1, -1.0).amax(1)
        margin = -torch.log(MARGIN_TOP - others).mean()

        confidence = clean_logits.softmax(1).gather(1, label_B1).squeeze(1)
        weight = WEIGHT_TOP - confidence
        divergence = (kl_divergence(clean_logits, logits) * weight).mean()
        return self._cross_entropy(logits, labels) + margin + self.beta * divergence
