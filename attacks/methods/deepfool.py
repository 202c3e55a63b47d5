"""DeepFool: over the nearest boundary of the linearised model, again and again (Moosavi-Dezfooli et
al., arXiv 1511.04599)."""

from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.balls.balls import Bounds
from ironmoe.attacks.balls.hyperplane import length
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Rows, where
from ironmoe.attacks.methods.nearest_boundary import BoundaryAttack

# of the way made; steps that only shrink would end on the boundary, on the wrong side but for
# rounding
LEAST_STRIDE = 1e-3


class DeepFool(BoundaryAttack):
    """Adds up shortest steps to the nearest linearised boundary until the point is misclassified
    (Algorithm 2 of the paper).

    Each point asked about overshoots the sum of steps, as in the authors' code, and is clipped to
    the box; the steps know nothing of the box. With a finite ``eps`` an image falls if it is
    misclassified within eps; the point found beyond is projected onto the ball and predicted once
    more. The distances of FAB are shorter, for many more passes.

    Args (beyond those of ``Attack``):
        eps: largest distance that counts; inf: any.
        steps: at most, ≥ 0. Each asks for the gradient of top_classes − 1 logit differences.
        overshoot: the sum of steps is gone 1 + overshoot times, ≥ 0.
        top_classes: the classes most likely at the image, the label included, whose boundaries are
            considered, ≥ 2.
    """

    norms = ("Linf", "L2")

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
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        if not overshoot >= 0:
            raise ValueError(f"overshoot must be at least 0, got {overshoot}")
        if top_classes < 2:
            raise ValueError(f"top_classes must be at least 2, got {top_classes}")
        self.steps, self.overshoot, self.top_classes = steps, overshoot, top_classes
        self.queries = steps * (top_classes - 1)

    def __repr__(self) -> str:
        return (
            f"DeepFool({self.norm}, eps={self.eps}, steps={self.steps}, "
            f"overshoot={self.overshoot}, top_classes={self.top_classes})"
        )

    def start(self, rows: Rows) -> None:
        super().start(rows)
        rows["point"] = rows["clean"]
        rows["moved"] = torch.zeros_like(rows["clean"])  # sum of the steps
        rows["made"] = torch.zeros_like(rows["label"])
        rows["finished"] = torch.full_like(rows["finished"], self.steps == 0)

    def advance(self, rows: Rows, logits: Tensor, loss: Tensor, grad: Tensor | None) -> None:
        assert grad is not None
        ball, width = self.ball(rows), self.bounds[1] - self.bounds[0]
        beyond = self.fooled(logits, rows) & (ball.distance(rows["point"]) > rows["eps"])
        last = self.note_boundary(rows, logits, loss, grad)
        step = last & ~beyond
        # Where the gradient vanishes, steps have no length, or so much that sums would overflow.
        stride = torch.where(rows["gap"].isfinite(), rows["gap"], 0).maximum(
            LEAST_STRIDE * length(rows["moved"], self.norm)
        )
        moved = ball.ascend(rows["moved"], rows["weight"], stride).clamp(-width, width)
        rows["moved"] = where(step, moved, rows["moved"])
        rows["point"] = where(
            step, (rows["clean"] + (1 + self.overshoot) * moved).clamp(*self.bounds), rows["point"]
        )
        rows["asked"] = torch.where(last, 0, rows["asked"] + 1)
        rows["made"] = rows["made"] + step
        rows["finished"] = rows["finished"] | beyond | (rows["made"] >= self.steps)
