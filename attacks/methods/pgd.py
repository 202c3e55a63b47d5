"""PGD: projected gradient descent, the attack that others are compared with (Madry et al., arXiv
1706.06083, section 2.1)."""

from typing import Any

from torch import Tensor

from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.losses import Loss
from ironmoe.attacks.methods.last_iterate import LastIteratePGD
from ironmoe.attacks.methods.parts.fixed_step import FixedStepAttack
from ironmoe.attacks.methods.vmoe_pgd import VMoEPGD
from ironmoe.attacks.registry import register_attack


@register_attack(
    summary="Projected gradient ascent from random starts.",
    source="1706.06083",
    takes=("steps", "restarts", "alpha"),
    names={"pgd": {"steps": 40, "restarts": 2}},
)
class PGD(FixedStepAttack):
    """Steepest ascent with projection (Madry et al., arXiv 1706.06083): by the sign in Linf, the
    normalised gradient in L2, and the largest entries in L1.

    The image is kept in float32 and every step is projected exactly onto ball and box. With
    ``early_stop`` an example that is misclassified leaves the batch at once, which makes weak
    models cheap to evaluate. Without it the search goes on, and of all points visited each example
    keeps the best: a misclassified one before any other, then the highest loss. The verdict is the
    same.

    In Linf an attempt that may stop early also ends when it comes back to a point where it has
    been: from there it would go round in a circle (arXiv 2503.19347). Nothing is lost but passes,
    as long as the model says the same thing twice.

    In a model with a capacity or with Expert Choice images influence each other: whole groups are
    attacked, and the best point of a group, for all its images at once, is kept.

    Args (beyond those of ``Attack``):
        alpha: step length in the units of eps; None is 2.5 · eps / steps (Madry's rule), but at
            least eps / 10, so that many steps do converge: in L2 a step of eps / n closes
            1 / (n + 1) of the angle to the optimum.
        steps: gradient steps of each restart, ≥ 0.
        random_start: start from a random point of the ball instead of the image.
        loss: "ce", "margin", "dlr", "sigmoid", or a callable (logits, labels) → (B,); for another
            goal one of its losses. None: the goal's usual one, "ce" for labels.
        restarts: runs from different starts, ≥ 1; more than one needs ``random_start``.
        early_stop: stop working on an example once it is misclassified.
    """

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | None = None,
        steps: int = 10,
        random_start: bool = True,
        norm: str = "Linf",
        loss: str | Loss | None = None,
        restarts: int = 1,
        bounds: Bounds = (0.0, 1.0),
        seed: int = 0,
        *,
        early_stop: bool = True,
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
            restarts=restarts,
            bounds=bounds,
            seed=seed,
            early_stop=early_stop,
            **options,
        )

    @staticmethod
    def vmoe(
        model: Model,
        eps: float | Tensor = 1 / 127.5,
        steps: int = 40,
        *,
        loss: str | Loss | None = None,
        auxiliary_loss: bool = False,
        bounds: Bounds = (-1.0, 1.0),
        **options: Any,
    ) -> VMoEPGD:
        """The V-MoE paper's attack (arXiv 2210.10253), as its official code runs it: ``VMoEPGD``.

        Args:
            model: takes images in ``bounds``, by default [−1, 1] as the official models; eps =
                k / 127.5 is there k / 255 of the range.
            steps: of length eps / steps each.
            loss: "ce" (softmax), "sigmoid" (the JFT model's), or a callable (logits, labels) →
                (B,). None: "ce", and for another goal its usual one.
            auxiliary_loss: ascend the mean of the loss plus the routers' auxiliary losses.
            options: ``targeted``, ``eot``, ``normalize``, ``logits_fn``, ``attack_dtype`` and
                ``routing`` of ``Attack``.
        """
        return VMoEPGD(
            model, eps, steps, loss=loss, auxiliary_loss=auxiliary_loss, bounds=bounds, **options
        )

    @staticmethod
    def torchattacks(
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        norm: str = "Linf",
        **options: Any,
    ) -> LastIteratePGD:
        """PGD as torchattacks 3.5 runs it (in Linf), to reproduce numbers: every image walks all
        the way, misclassified ones too, and the last point is the result. The start is drawn by
        torch's global generator, so that the same ``torch.manual_seed`` gives the same images. It
        is weaker than ``PGD``, and its verdicts depend on the batch."""
        return LastIteratePGD(
            model,
            eps,
            alpha=alpha,
            steps=steps,
            random_start=random_start,
            norm=norm,
            **options,
        )
