"""PGD as the official code of the V-MoE robustness paper runs it (Puigcerver et al., arXiv
2210.10253, section 4); made by ``PGD.vmoe``."""

from typing import Any

from torch import Tensor, nn

from ironmoe.attacks.attack import FixedRadiusAttack
from ironmoe.attacks.balls.ball import Ball, ball_at
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.balls.linf import LinfBall
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.engine.search import Keeps
from ironmoe.attacks.losses import Loss
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.registry import register_attack
from ironmoe.attacks.routing.auxiliary_loss import AuxiliaryLoss

UNBOUNDED = (float("-inf"), float("inf"))
# The ball depends on these columns; on the box, that images may have of their own, it does not.
OF_BALL = ("clean", "eps", "eps_scale")


@register_attack(
    summary="PGD as the V-MoE robustness paper runs it; made by `PGD.vmoe`.",
    source="2210.10253",
    names={},
)
class VMoEPGD(FixedRadiusAttack):
    """Sign ascent on the mean loss of the batch: ``steps`` steps of length eps / steps from the
    image, the last point taken.

    There is no random start, no restart and no clipping to the valid pixels. Steps that add up to
    eps need no projection onto the ball (what rounding adds, 10⁻⁷, is taken back at the end). Every
    image of the batch is attacked all the way, misclassified ones too: under a capacity the images
    of a group influence each other, so the groups must stay as they are.

    Its accuracies are no bounds on those of attacks that stay inside the valid pixels, as ``PGD``
    does: it may find more outside. ``adversarial.clamp(*bounds)`` says what is left of it inside.
    """

    needs = LinfBall  # steps of eps / steps add up to eps in no other norm
    keeps: Keeps = "last"
    attacks_wrong = True

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 1 / 127.5,
        steps: int = 40,
        *,
        loss: str | Loss | None = None,
        auxiliary_loss: bool = False,
        bounds: Bounds = (-1.0, 1.0),
        **options: Any,
    ) -> None:
        if auxiliary_loss and options.get("routing") is not None:
            raise ValueError(
                "auxiliary_loss must be False with a routing mode, which takes its place, got "
                f"{options['routing']}"
            )
        if auxiliary_loss:
            modules = model.modules() if isinstance(model, nn.Module) else ()
            if not any(hasattr(module, "aux_loss_in_eval") for module in modules):
                raise ValueError(
                    "auxiliary_loss needs a model with TopKRouters, whose losses it ascends"
                )
            options["routing"] = AuxiliaryLoss()

        super().__init__(model, eps, bounds=bounds, **options)
        check_counts(1, steps=steps)
        self.steps = steps
        self.max_queries = steps
        self.auxiliary_loss = auxiliary_loss
        self.loss_of = self.goal.chosen_loss(loss)
        self._raised = self.goal.loss_named(loss)

    def __repr__(self) -> str:
        return (
            f"PGD.vmoe(Linf, eps={self.eps_text}, steps={self.steps}, "
            f"auxiliary_loss={self.auxiliary_loss})"
        )

    def ball(self, attempts: Attempts) -> Ball:
        """The ball alone: its points may leave the valid pixels."""
        shared = self._elements.of(self.eps, UNBOUNDED, attempts["clean"])
        own = {name: attempts[name] for name in OF_BALL if name in attempts}
        return ball_at(LinfBall, own, shared)

    def start(self, attempts: Attempts) -> None:
        attempts["point"] = attempts["clean"]

    def loss(self, logits: Tensor, attempts: Attempts) -> Tensor:
        return self.signed(self._raised(logits, attempts["label"]))

    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        assert grad is not None
        alpha = attempts["eps"] / self.steps
        attempts["point"] = self.ball(attempts).ascend(attempts["point"], grad, alpha)
        attempts["finished"] = attempts["finished"] | (attempts["queries"] >= self.steps)
