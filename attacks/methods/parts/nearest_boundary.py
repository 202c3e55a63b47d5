"""What FAB and DeepFool share: the nearest class boundary of the linearised model, asked for one
class at a time."""

from typing import Any, cast

import torch
from torch import Tensor

from ironmoe.attacks.attack import LeastDistanceAttack
from ironmoe.attacks.balls.abilities import HyperplaneBall
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Attempts, where
from ironmoe.attacks.losses import check_several_classes


class BoundaryAttack(LeastDistanceAttack):
    """An attack that goes to the nearest of the boundaries z_k = z_label, each linearised at the
    point where it is.

    A query brings one gradient. So an attempt asks at one point about one contender k after
    another and remembers which boundary was the nearest. The contenders are its target or, without
    targets, all wrong classes; or, as in the authors' DeepFool, those most likely at the first
    question, so that a random model does not change them on the way.

    Attempts have

    asked:  (R,) int64, how many contenders it has asked about at this point; −1 if the first
        question serves to know them
    ranked: (R, K) int64, the contenders, if they are not all classes
    weight: (R, …) gradient of z_k − z_label, of the nearest boundary so far
    value:  (R,) z_k − z_label there
    gap:    (R,) distance |value| / ‖weight‖ in the dual norm, of the boundary without a box; inf
            where the gradient is 0
    """

    needs = HyperplaneBall
    needs_classes = "takes its gradients for those of logit differences"
    starts_clean = True

    top_classes: int | None = None
    """How many classes are looked at, the label included, if there are no targets; None: all."""

    def __init__(
        self, model: Model, eps: float | Tensor, *, targeted: bool = False, **options: Any
    ) -> None:
        if targeted:
            raise ValueError(
                f"targeted must be False for {type(self).__name__}, which leaves its class for "
                "the nearest other one"
            )
        super().__init__(model, eps, **options)
        if self.attacked_model.routing.adds_term:
            raise ValueError(
                f"routing must not add to the loss for {type(self).__name__}, which takes its "
                "gradients for those of logit differences, "
                f"got {self.attacked_model.routing}"
            )

    def hyperplane_ball(self, attempts: Attempts) -> HyperplaneBall:
        """The balls of the attempts, with lengths and steps onto hyperplanes."""
        return cast(HyperplaneBall, self.ball(attempts))

    def start(self, attempts: Attempts) -> None:
        attempts["asked"] = torch.zeros_like(attempts["key"])
        attempts["ranked"] = attempts["asked"].unsqueeze(1).expand(-1, (self.top_classes or 1) - 1)
        if self.top_classes and (self.eot > 1 or self.attacked_model.averages_losses):
            # The mean is taken of the gradients of one class, so the classes must be known before.
            attempts["asked"] = attempts["asked"] - 1

        attempts["weight"] = torch.zeros_like(attempts["clean"])
        nothing = torch.zeros_like(attempts["eps"], dtype=attempts["clean"].dtype)
        attempts["value"] = nothing
        attempts["gap"] = nothing

    def loss(self, logits: Tensor, attempts: Attempts) -> Tensor:
        """(R,) z_k − z_label."""
        check_several_classes(logits, type(self).__name__)
        right = attempts["label"].unsqueeze(1)
        contender = self._contender(logits, attempts, right)
        return (logits.gather(1, contender) - logits.gather(1, right)).squeeze(1)

    def _contender(self, logits: Tensor, attempts: Attempts, right: Tensor) -> Tensor:
        """(R, 1) the class that this query is about."""
        if self.targets:
            return attempts["target"].unsqueeze(1)
        asked = attempts["asked"].clamp_min(0).unsqueeze(1)
        if self._all(logits):
            return asked + (asked >= right)

        first = (attempts["queries"] == 0).unsqueeze(1)
        likeliest = self._likely(logits, attempts)[:, :1]
        return torch.where(first, likeliest, attempts["ranked"].gather(1, asked))

    def note_boundary(
        self,
        attempts: Attempts,
        ball: HyperplaneBall,
        logits: Tensor,
        loss: Tensor,
        grad: Tensor,
    ) -> Tensor:
        """Compare the boundary just asked about with those before; (R,) bool: it was the last one
        at this point."""
        if not self.targets and not self._all(logits):
            attempts["ranked"] = where(
                attempts["queries"] == 1, self._likely(logits, attempts), attempts["ranked"]
            )

        weight = grad.to(attempts["clean"].dtype)
        value = loss.to(weight.dtype)
        slope = ball.slope(weight)
        gap = torch.where(slope > 0, value.abs() / slope, float("inf"))
        nearer = (attempts["asked"] <= 0) | (gap < attempts["gap"])
        attempts["weight"] = where(nearer, weight, attempts["weight"])
        attempts["value"] = torch.where(nearer, value, attempts["value"])
        attempts["gap"] = torch.where(nearer, gap, attempts["gap"])
        return attempts["asked"] + 1 >= self._contenders(logits)

    def _contenders(self, logits: Tensor) -> int:
        """How many boundaries are asked about at each point."""
        classes = logits.shape[1]
        return 1 if self.targets else min(self.top_classes or classes, classes) - 1

    def _all(self, logits: Tensor) -> bool:
        """Whether every wrong class is a contender."""
        return self._contenders(logits) == logits.shape[1] - 1

    def _likely(self, logits: Tensor, attempts: Attempts) -> Tensor:
        """(R, K) the likeliest wrong classes, in order."""
        wrong = logits.detach().scatter(1, attempts["label"].unsqueeze(1), float("-inf"))
        return wrong.topk(self._contenders(logits), dim=1).indices
