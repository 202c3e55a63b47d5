"""DeepFool: it steps over the nearest boundary of the linearised model, again and again
(Moosavi-Dezfooli et al., arXiv 1511.04599, algorithm 2)."""

from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.aliases.declared import declare
from ironmoe.attacks.balls.abilities import StraightBall
from ironmoe.attacks.balls.ball import Ball
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Attempts, where
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.methods.parts.nearest_boundary import BoundaryAttack
from ironmoe.attacks.registry import register_attack

# Each step has at least this share of the way made so far. Steps that only shrink would end on the
# boundary, and rounding may leave them on the wrong side of it.
LEAST_STRIDE = 1e-3


@register_attack(
    summary="Steps over the nearest linearised boundary until the class changes.",
    source="1511.04599",
    takes=("steps",),
    names={"deepfool": {}},
)
class DeepFool(BoundaryAttack):
    """Adds up shortest steps to the nearest linearised boundary until the point is misclassified
    (Algorithm 2 of the paper).

    Each point that it asks about overshoots the sum of steps, as in the authors' code, and is
    clipped to the box; the steps know nothing of the box. With a finite ``eps`` an image falls if
    it is misclassified within eps; a point found beyond is projected onto the ball and predicted
    once more. FAB finds shorter distances, with many more passes.

    Args (beyond those of ``Attack``):
        eps: largest distance that counts; inf: any distance does.
        steps: at most so many, ≥ 0. Each asks for the gradient of top_classes − 1 logit
            differences.
        overshoot: points lie at the image plus 1 + overshoot times the sum of steps, ≥ 0.
        top_classes: the classes most likely at the image, the label included, whose boundaries are
            considered, ≥ 2.
    """

    aliases = declare(max_iter="steps", num_classes="top_classes")

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = float("inf"),
        steps: int = 50,
        overshoot: float = 0.02,
        top_classes: int = 10,
        norm: str = "L2",
        bounds: Bounds = (0.0, 1.0),
        **options: Any,
    ) -> None:
        super().__init__(model, eps, norm=norm, bounds=bounds, **options)
        check_counts(0, steps=steps)
        if not overshoot >= 0:
            raise ValueError(f"overshoot must be at least 0, got {overshoot}")
        if top_classes < 2:
            raise ValueError(f"top_classes must be at least 2, got {top_classes}")

        self.steps = steps
        self.overshoot = overshoot
        self.top_classes = top_classes
        self.max_queries = steps * (top_classes - 1)

    @classmethod
    def takes_ball(cls, ball: type[Ball]) -> bool:
        """DeepFool needs StraightBall, too, because it moves sums of steps, which are no images."""
        return super().takes_ball(ball) and issubclass(ball, StraightBall)

    def __repr__(self) -> str:
        return (
            f"DeepFool({self.norm}, eps={self.eps_text}, steps={self.steps}, "
            f"overshoot={self.overshoot}, top_classes={self.top_classes})"
        )

    def start(self, attempts: Attempts) -> None:
        super().start(attempts)
        attempts["point"] = attempts["clean"]
        attempts["moved"] = torch.zeros_like(attempts["clean"])  # the sum of the steps
        attempts["made"] = torch.zeros_like(attempts["key"])
        attempts["finished"] = torch.full_like(attempts["finished"], self.steps == 0)

    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        assert grad is not None
        ball = self.hyperplane_ball(attempts)
        outside = self.distance(attempts, attempts["point"]) > attempts["eps"]
        beyond = self.fooled(logits, attempts) & outside
        last = self.note_boundary(attempts, ball, logits, loss, grad)
        step = last & ~beyond

        # Where the gradient vanishes, a step has no length, or so much that sums would overflow.
        gap = torch.where(attempts["gap"].isfinite(), attempts["gap"], 0)
        stride = gap.maximum(LEAST_STRIDE * ball.measure(attempts["moved"]))
        moved = ball.ascend(attempts["moved"], attempts["weight"], stride)
        moved = moved.clamp(-ball.width, ball.width)
        attempts["moved"] = where(step, moved, attempts["moved"])
        overshot = ball.clip(attempts["clean"] + (1 + self.overshoot) * moved)
        attempts["point"] = where(step, overshot, attempts["point"])

        attempts["asked"] = torch.where(last, 0, attempts["asked"] + 1)
        attempts["made"] = attempts["made"] + step
        attempts["finished"] = attempts["finished"] | beyond | (attempts["made"] >= self.steps)
