"""PGD as the library torchattacks runs it, to reproduce its numbers; made by
``PGD.torchattacks``."""

from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.aliases.declared import Only, declare
from ironmoe.attacks.balls.ball import ball_of
from ironmoe.attacks.balls.linf import LinfBall
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.losses import Loss
from ironmoe.attacks.methods.parts.fixed_step import FixedStepAttack
from ironmoe.attacks.result import AttackResult
from ironmoe.kernels.attack_step import column


class LastIteratePGD(FixedStepAttack):
    """Every image walks all the way, misclassified ones too, and the last point is the result. In
    Linf the start is drawn by torch's global generator.

    Its verdicts depend on the batch. Args are those of ``PGD``, by keyword.
    """

    attacks_wrong = True

    aliases = declare(early_stop=Only((False,), "every image walks all the way; PGD may stop"))

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        *,
        alpha: float | None = None,
        steps: int = 10,
        random_start: bool = True,
        norm: str = "Linf",
        loss: str | Loss | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            eps,
            alpha=alpha,
            steps=steps,
            random_start=random_start,
            norm=norm,
            loss=loss,
            early_stop=False,
            **options,
        )
        self.keeps = "last"
        self._drawn_by_torch = random_start and ball_of(norm) is LinfBall

    def run(
        self, images: Tensor, labels: Tensor, indices: Tensor | None = None, **options: Any
    ) -> AttackResult:
        result = super().run(images, labels, indices, **options)
        if self._drawn_by_torch:
            # The run put the user's generator back. It goes on as torchattacks leaves it.
            torch.empty_like(result.adversarial).uniform_(-1, 1)
        return result

    def start(self, attempts: Attempts) -> None:
        super().start(attempts)
        if self._drawn_by_torch:
            clean = attempts["clean"]
            noise = torch.empty_like(clean).uniform_(-1, 1)
            ball = self.ball(attempts)
            start = clean + ball.in_pixels(column(attempts["eps"], clean) * noise)
            attempts["point"] = ball.clip(start)
