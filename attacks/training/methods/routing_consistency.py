"""Routing that stays where the image is attacked: a penalty on what an attack does to routers, as
patch-level routing consistency (PRC, OJSP 2025) has it between two augmentations."""

from typing import Any

from torch import Tensor, nn

from ironmoe.attacks.routing.layers import routed_layers
from ironmoe.attacks.training.checks import check_factor
from ironmoe.attacks.training.inner.attacks import pgd
from ironmoe.attacks.training.method import Strength, TrainingMethod
from ironmoe.attacks.training.registry import register_training_method
from ironmoe.attacks.training.routers import routing_of_passes
from ironmoe.moe.sharded import is_sharded


@register_training_method(
    "routing-consistency",
    summary="Cross-entropy of attacked images, plus a penalty where the attack moves routing.",
    cost="2n + 6",
    source="PRC, OJSP 2025",
    takes=("weight",),
    needs_experts=True,
)
class RoutingConsistency(TrainingMethod):
    """CE(x′) + weight · the mean over layers and tokens of KL(routing(x) ‖ routing(x′)), a routing
    being softmax(router logits); x′ by PGD on the cross-entropy.

    With ``routing=RoutingDivergence()`` the attack moves the routing on purpose, too.

    Args (beyond those of ``TrainingMethod``):
        weight: of the divergence.
        through_clean: the gradient of the divergence goes through both routings; False: through
            that of x′ alone, so that the routing of the clean images is not drawn towards it.

    Raises:
        ValueError: in addition, the model has no MoE layer that chooses experts.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        weight: float = 1.0,
        through_clean: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, **options)
        check_factor(weight=weight)
        routed_layers(model)
        self.weight = float(weight)
        self.through_clean = through_clean
        self._clean_logits: Tensor | None = None

    def _attack(self, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
        eps, alpha = strength
        return pgd(self.inner, images, labels, eps=eps, alpha=alpha, steps=self.steps)

    def _losses(self, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        with routing_of_passes(self.model) as routing:
            clean_logits = self._logits(images, images)
            logits = self._logits(points, images)

        # A pass has auxiliary losses as long as its output lives; this one is no part of the loss.
        self._clean_logits = None if self.auxiliary_loss else clean_logits
        loss = self._cross_entropy(logits, labels)
        self._keep("clean_correct", clean_logits, labels)
        self._keep("adversarial_correct", logits, labels)
        if is_sharded(self.model):
            # FSDP2 gathers the weights of a layer when a gradient comes to its output.
            loss = loss + 0 * clean_logits.sum()
        return loss + self.weight * routing.divergence(through_clean=self.through_clean)
