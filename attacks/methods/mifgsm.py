"""MI-FGSM: iterated FGSM with momentum (Dong et al., arXiv 1710.06081, algorithm 1)."""

from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.aliases.declared import Only, declare
from ironmoe.attacks.balls import lengths
from ironmoe.attacks.balls.abilities import StraightBall
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.losses import Loss
from ironmoe.attacks.methods.pgd import PGD
from ironmoe.attacks.registry import register_attack


@register_attack(
    summary="Steps along the decayed sum of gradients.",
    source="1710.06081",
    takes=("steps", "alpha"),
    names={"mifgsm": {}},
)
class MIFGSM(PGD):
    """Momentum iterative FGSM (Dong et al., arXiv 1710.06081): steps along the decayed sum of
    L1-normalised gradients, from the image.

    It is made to fool models other than its own. So it goes all the way by default and keeps the
    point of the highest loss: the first misclassified point lies barely across the boundary, and
    seldom across that of another model. The verdict on its own model is the same either way.

    Args (beyond those of ``Attack``):
        alpha: step length; None is eps / steps.
        steps: gradient steps, ≥ 0.
        decay: of the momentum, μ ≥ 0.
        loss: as for ``PGD``.
        early_stop: stop at the first misclassified point, for fewer passes.
    """

    needs = StraightBall
    remembers = True  # the momentum makes the same point another state

    aliases = declare(
        random_start=Only((False,), "it starts at the image; PGD may start at random"),
        restarts=Only((1,), "without a random start they would be the same; use PGD"),
    )

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | None = None,
        steps: int = 10,
        decay: float = 1.0,
        norm: str = "Linf",
        loss: str | Loss | None = None,
        bounds: Bounds = (0.0, 1.0),
        *,
        early_stop: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            eps,
            alpha=alpha,
            steps=steps,
            random_start=False,
            norm=norm,
            loss=loss,
            bounds=bounds,
            restarts=1,
            early_stop=bool(early_stop),
            **options,
        )
        self._leaves_it_open = early_stop is None
        if not decay >= 0:
            raise ValueError(f"decay must be at least 0, got {decay}")
        self.decay = decay

    def chosen_settings(self) -> dict[str, Any]:
        """Where the user chose nothing, the settings are those of earlier journals, in which an
        attempt stopped early. Its verdict is the same, so they go on."""
        settings = super().chosen_settings()
        if self._leaves_it_open:
            settings |= {"early_stop": True, "keeps": "first"}
        return settings

    def start(self, attempts: Attempts) -> None:
        super().start(attempts)
        attempts["momentum"] = torch.zeros_like(attempts["clean"])

    def direction(self, attempts: Attempts, grad: Tensor) -> Tensor:
        flat = grad.to(attempts["clean"].dtype).flatten(1)
        length = lengths.total(flat).unsqueeze(1)
        unit = torch.where(length > 0, flat / length, 0).view_as(grad)
        attempts["momentum"] = self.decay * attempts["momentum"] + unit
        return attempts["momentum"]

    def usual_step_length(self, eps: Tensor) -> Tensor:
        return eps / max(self.steps, 1)
