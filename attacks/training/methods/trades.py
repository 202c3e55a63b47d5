"""TRADES (Zhang et al., arXiv 1901.08573): accuracy and smoothness, weighed against each other."""

from typing import Any

from torch import Tensor, nn

from ironmoe.attacks.training.checks import check_factor
from ironmoe.attacks.training.inner.attacks import kl_divergence, kl_pgd
from ironmoe.attacks.training.method import Strength, TrainingMethod
from ironmoe.attacks.training.registry import register_training_method


@register_training_method(
    "trades",
    summary="Cross-entropy of clean images, plus β times the divergence of what the model says of "
    "attacked ones.",
    cost="2n + 7",
    source="1901.08573",
    takes=("beta",),
)
class TRADES(TrainingMethod):
    """CE(x) + β · mean KL(p(x) ‖ p(x′)), x′ by ascent on this divergence from x + N(0, 0.001²).

    Args (beyond those of ``TrainingMethod``):
        beta: β, 6 for CIFAR-10 and 1 for MNIST in the paper.
    """

    def __init__(self, model: nn.Module, eps: float, *, beta: float = 6.0, **options: Any) -> None:
        super().__init__(model, eps, **options)
        check_factor(beta=beta)
        self.beta = float(beta)

    def _attack(self, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
        return kl_pgd(self.inner, images, eps=strength.eps, alpha=strength.alpha, steps=self.steps)

    def _losses(self, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        clean_logits = self._logits(images, images)
        logits = self._logits(points, images)

        loss = self._cross_entropy(clean_logits, labels)
        self._keep("clean_correct", clean_logits, labels)
        self._keep("adversarial_correct", logits, labels)
        return loss + self.beta * kl_divergence(clean_logits, logits).mean()
