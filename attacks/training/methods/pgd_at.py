"""Adversarial training by PGD (Madry et al., arXiv 1706.06083), and as the V-MoE paper does it."""

from typing import Any

from torch import Tensor, nn

from ironmoe.attacks.engine.borrow import in_eval_mode
from ironmoe.attacks.losses import Loss, get_loss
from ironmoe.attacks.training.checks import check_count
from ironmoe.attacks.training.inner.attacks import pgd, vmoe_settings
from ironmoe.attacks.training.method import Attacked, Strength, TrainingMethod
from ironmoe.attacks.training.mixup import Mixup
from ironmoe.attacks.training.registry import register_training_method


@register_training_method(
    "pgd-at",
    summary="Cross-entropy of images that PGD made.",
    cost="2n + 3",
    source="1706.06083",
)
class PGDAT(TrainingMethod):
    """CE(x′), x′ by PGD on the cross-entropy.

    Args (beyond those of ``TrainingMethod``):
        loss: "ce", another name of ``ironmoe.attacks.losses``, or (outputs, labels) → (B,): what is
            raised by the attack, and lowered in the mean by the training. Only "ce" takes label
            smoothing and probabilities as labels.
        start: of the attack: "uniform", "clean", "normal".
        mixup: mixes the images of a batch and their labels, which become probabilities.
        mixup_first: mix, then attack the mixed images; False: attack, then mix what was attacked.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        loss: str | Loss = "ce",
        start: str = "uniform",
        mixup: Mixup | None = None,
        mixup_first: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, **options)
        if loss != "ce" and self.label_smoothing:
            raise ValueError(
                f'label_smoothing must be 0 where loss is not "ce", got {self.label_smoothing}'
            )
        if start not in ("uniform", "normal", "clean"):
            raise ValueError(f'start must be "uniform", "normal" or "clean", got {start!r}')
        if mixup is not None and not callable(mixup):
            raise TypeError(f"mixup must be a Mixup or None, got {mixup!r}")
        self.loss = loss
        self.loss_of = get_loss(loss)
        self.start = start
        self.mixup = mixup
        self.mixup_first = mixup_first

    @classmethod
    def vmoe(
        cls,
        model: nn.Module,
        eps: float,
        *,
        steps: int,
        attack_auxiliary_loss: bool = False,
        **options: Any,
    ) -> "PGDAT":
        """As the official trainer of V-MoE does it (Puigcerver et al., arXiv 2210.10253).

        Steps of eps / steps from the image itself, nothing clipped to valid pixels, the model in
        training mode with fresh router noise in each step. With ``mixup`` images are mixed before
        they are attacked, as there.

        Args:
            eps, steps: ``max_epsilon`` and ``num_updates`` there. Pixels there are in [−1, 1], so
                1 / 255 of their range is 1 / 127.5.
            attack_auxiliary_loss: the attack raises the routers' auxiliary losses, too.
            options: as of the class.
        """
        check_count(steps=steps)
        settings = vmoe_settings(attack_auxiliary_loss)
        return cls(
            model, eps, steps=steps, alpha=eps / steps, start="clean", **(settings | options)
        )

    def _attack(self, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
        return pgd(
            self.inner,
            images,
            labels,
            eps=strength.eps,
            alpha=strength.alpha,
            steps=self.steps,
            loss=self.loss_of,
            start=self.start,
        )

    def _attacked(self, images: Tensor, labels: Tensor) -> Attacked:
        if self.mixup is None:
            return super()._attacked(images, labels)
        classes = self._classes(images)
        if self.mixup_first:
            return super()._attacked(*self.mixup(images, labels, classes))

        points, mixed = self.mixup(self._attack(images, labels, self.strength), labels, classes)
        return Attacked(images, mixed, points)

    def _losses(self, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        if self.loss == "ce":
            return super()._losses(images, labels, points)
        logits = self._logits(points, images)
        if logits.ndim == 2 and labels.shape == logits.shape[:1]:  # else it tells no classes
            self._keep("adversarial_correct", logits, labels)
        return self.loss_of(logits, labels).mean()

    def _classes(self, images: Tensor) -> int:
        """How many classes the model tells, asked once."""
        if self._number_of_classes is None:
            # in eval mode, since one image has no batch statistics
            with self.inner.running(images), in_eval_mode(self.inner.model):
                self._number_of_classes = self.inner.logits(images[:1]).shape[1]
        return self._number_of_classes

    _number_of_classes: int | None = None
