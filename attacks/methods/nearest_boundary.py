"""What FAB and DeepFool share: the nearest class boundary of the linearised model, asked for one
class at a time."""

from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.balls.hyperplane import DUAL, length
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Rows, where


class BoundaryAttack(Attack):
    """An attack that goes to the nearest of the boundaries z_k = z_label, each linearised at the
    point where it is.

    A question brings one gradient. So a row asks at one point about one contender k after another
    and remembers which boundary was the nearest. The contenders are the row's target or, without
    targets, all wrong classes; or, as in the authors' DeepFool, those most likely at the first
    question, so that a random model does not change them on the way.

    Rows have

    asked:  (R,) int64, contenders asked about at this point before; −1 if the first question is
        there to know them
    ranked: (R, K) int64, the contenders, if they are not all classes
    weight: (R, …) gradient of z_k − z_label, of the nearest boundary so far
    value:  (R,) z_k − z_label there
    gap:    (R,) distance |value| / ‖weight‖ in the dual norm, of the boundary without a box; inf
            where the gradient is 0
    """

    inside = False
    takes_groups = False
    starts_clean = True
    # how many are looked at, the label included, if there are no targets; None: all
    top_classes: int | None = None

    def __init__(self, model: Model, *args: Any, targeted: bool = False, **options: Any) -> None:
        if targeted:
            raise ValueError(
                f"targeted must be False for {type(self).__name__}, which leaves its class for "
                "the nearest other one"
            )
        super().__init__(model, *args, **options)
        if self.victim.routing.adds_term:
            raise ValueError(
                f"routing must not add to the loss for {type(self).__name__}, which takes its "
                "gradients for those of logit differences, "
                f"got {self.victim.routing}"
            )

    def start(self, rows: Rows) -> None:
        rows["asked"] = torch.zeros_like(rows["label"])
        rows["ranked"] = rows["asked"].unsqueeze(1).expand(-1, (self.top_classes or 1) - 1)
        if self.top_classes and self.eot > 1:  # the mean is taken of one class's gradients
            rows["asked"] = rows["asked"] - 1
        rows["weight"] = torch.zeros_like(rows["clean"])
        rows["value"] = rows["gap"] = torch.zeros_like(rows["eps"], dtype=rows["clean"].dtype)

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        """(R,) z_k − z_label."""
        right = rows["label"].unsqueeze(1)
        if self.targets:
            contender = rows["target"].unsqueeze(1)
        else:
            asked = rows["asked"].clamp_min(0).unsqueeze(1)
            if self._all(logits):
                contender = asked + (asked >= right)
            else:
                first = (rows["queries"] == 0).unsqueeze(1)
                contender = torch.where(
                    first, self._likely(logits, rows)[:, :1], rows["ranked"].gather(1, asked)
                )
        return (logits.gather(1, contender) - logits.gather(1, right)).squeeze(1)

    def note_boundary(self, rows: Rows, logits: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        """Compare the boundary just asked about with those before; (R,) bool: it was the last one
        at this point."""
        if not self.targets and not self._all(logits):
            rows["ranked"] = where(rows["queries"] == 1, self._likely(logits, rows), rows["ranked"])
        weight = grad.to(rows["clean"].dtype)
        value, slope = loss.to(weight.dtype), length(weight, DUAL[self.norm])
        gap = torch.where(slope > 0, value.abs() / slope, float("inf"))
        nearer = (rows["asked"] <= 0) | (gap < rows["gap"])
        rows["weight"] = where(nearer, weight, rows["weight"])
        rows["value"], rows["gap"] = (
            torch.where(nearer, value, rows["value"]),
            torch.where(nearer, gap, rows["gap"]),
        )
        return rows["asked"] + 1 >= self._contenders(logits)

    def _contenders(self, logits: Tensor) -> int:
        """How many boundaries are asked about at each point."""
        classes = logits.shape[1]
        return 1 if self.targets else min(self.top_classes or classes, classes) - 1

    def _all(self, logits: Tensor) -> bool:
        """Whether every wrong class is a contender."""
        return self._contenders(logits) == logits.shape[1] - 1

    def _likely(self, logits: Tensor, rows: Rows) -> Tensor:
        """(R, K) the likeliest wrong classes, in order."""
        wrong = logits.detach().scatter(1, rows["label"].unsqueeze(1), float("-inf"))
        return wrong.topk(self._contenders(logits), dim=1).indices
