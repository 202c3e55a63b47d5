"""FGSM: the fast gradient sign method, one full step (Goodfellow et al., arXiv 1412.6572, section
4)."""

from typing import Any

from torch import Tensor

from ironmoe.attacks.aliases.declared import Only, declare
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.losses import Loss
from ironmoe.attacks.methods.pgd import PGD
from ironmoe.attacks.registry import register_attack


@register_attack(
    summary="One full step along the gradient.",
    source="1412.6572",
    names={"fgsm": {}},
)
class FGSM(PGD):
    """One full step of length eps from the image (Goodfellow et al., arXiv 1412.6572); in L2 along
    the normalised gradient."""

    aliases = declare(
        steps=Only((1,), "PGD makes more steps"),
        alpha=Only((None,), "its one step has the length eps; PGD takes a step length"),
        random_start=Only((False,), "PGD(steps=1) starts at random"),
        restarts=Only((1,), "without a random start they would be the same; use PGD"),
    )

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        norm: str = "Linf",
        loss: str | Loss | None = None,
        bounds: Bounds = (0.0, 1.0),
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            eps,
            alpha=None,
            steps=1,
            random_start=False,
            norm=norm,
            loss=loss,
            restarts=1,
            bounds=bounds,
            **options,
        )

    def step_length(self, eps: Tensor) -> Tensor:
        return eps
