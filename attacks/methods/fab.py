"""FAB, the fast adaptive boundary attack: it looks for the nearest misclassified point along the
decision boundary (Croce & Hein, arXiv 1907.02044, algorithm 1)."""

from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.aliases.declared import Only, Turned, declare
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.balls.lengths import divisor
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Attempts, where
from ironmoe.attacks.methods.parts.counts import all_other_classes, check_counts
from ironmoe.attacks.methods.parts.nearest_boundary import BoundaryAttack
from ironmoe.attacks.registry import register_attack
from ironmoe.kernels.attack_step import column

# The image's projection has at least this share in the mean of the two projections. Without this
# limit 1 % of the attempts at ReLU networks stall on a boundary.
LEAST_SHARE = 0.003


@register_attack(
    summary="Goes along the decision boundary to where it is nearest; `targets=9` is FAB-T, "
    "`early_stop=False` looks for the least distance.",
    source="1907.02044",
    takes=("steps", "restarts"),
    names={"fab": {"targets": 0}, "fab-t": {"targets": 9}},
)
class FAB(BoundaryAttack):
    """Goes along the decision boundary to where it is nearest to the image (the paper's algorithm
    without its final search).

    A step linearises the difference of two logits, projects both the point and the image onto the
    boundary inside the box, and goes to a mean of the two, a little beyond. A misclassified point
    is pulled back towards the image.

    With ``targets`` it is FAB-T, as AutoAttack runs it (arXiv 2003.01690): there is one logit
    difference for each target, so a step costs one gradient. targets = 0 is the original, which
    asks for the gradients of all classes at every step; it suits few classes.

    After each step comes a check. If the last point was misclassified, the next one probably is,
    too: then (on CPU) the check asks for no gradient, since that is wanted at the point pulled
    back. Otherwise check and gradient share one pass. What is expected never changes what is found.

    Args (beyond those of ``Attack``):
        eps: with ``early_stop`` an image falls at a distance of at most eps; inf goes with
            early_stop=False.
        steps: gradient steps of each attempt, ≥ 0.
        restarts: attempts for each target, ≥ 1. The first starts at the image, later ones at a
            random point eps / 2 away.
        targets: how many of the classes most likely at the clean image are targets in turn; 0: all
            classes at once, untargeted.
        alpha_max: highest weight of the image's projection in the mean, 0 … 1.
        eta: overshoot, ≥ 1: a step goes this many times as far as the projection. Near 1, distances
            come closer to the least one.
        beta: of its way from the image a misclassified point keeps this share, above 0 and at most
            1.
        early_stop: stop at the first misclassified point within eps; else make all attempts and
            keep the nearest.
    """

    aliases = declare(
        n_target_classes="targets",
        n_classes=Turned("targets", all_other_classes, 10),
        multi_targeted=Only((True,), "give targets=0 for the attack on all classes at once"),
        loss_fn=Only((None,), "it follows differences of logits, and has no loss"),
    )

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        steps: int = 100,
        restarts: int = 1,
        targets: int = 9,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        norm: str = "Linf",
        bounds: Bounds = (0.0, 1.0),
        seed: int = 0,
        *,
        early_stop: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, norm=norm, bounds=bounds, seed=seed, **options)
        check_counts(0, steps=steps, targets=targets)
        check_counts(1, restarts=restarts)
        if not 0 <= alpha_max <= 1:
            raise ValueError(f"alpha_max must be between 0 and 1, got {alpha_max}")
        if not eta >= 1:
            raise ValueError(f"eta must be at least 1, got {eta}")
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be above 0 and at most 1, got {beta}")
        if restarts > 1 and bool(torch.as_tensor(eps).isinf().any()):
            raise ValueError(
                "eps must be finite if restarts is above 1, since they start eps / 2 away, got "
                f"{eps}"
            )

        self.steps = steps
        self.restarts = restarts
        self.targets = targets
        self.alpha_max = alpha_max
        self.eta = eta
        self.beta = beta
        self.early_stop = early_stop
        self.keeps = "first" if early_stop else "best"
        self.exhaustive = not early_stop
        self.starts_clean = restarts == 1
        # The query limit: 2 a step with targets; without, it is that of a model of 10 classes.
        self.max_queries = 2 * steps if targets else 10 * steps

    def __repr__(self) -> str:
        return (
            f"FAB({self.norm}, eps={self.eps_text}, steps={self.steps}, restarts={self.restarts}, "
            f"targets={self.targets}, seed={self.seed})"
        )

    def start(self, attempts: Attempts) -> None:
        super().start(attempts)
        no = torch.zeros_like(attempts["finished"])
        attempts["unseen"] = no  # the point is a new iterate, which no query was about
        attempts["crossed"] = no  # the iterate before was misclassified
        attempts["made"] = torch.zeros_like(attempts["key"])  # how many steps were made

        attempts["point"] = attempts["clean"]
        if self.restarts > 1:
            later = attempts["restart"] > 0
            attempts["point"] = where(later, self._random_start(attempts), attempts["clean"])
        attempts["finished"] = torch.full_like(no, self.steps == 0)

    def wants_gradient(self, attempts: Attempts) -> Tensor:
        return ~(attempts["unseen"] & attempts["crossed"]) & ~attempts["finished"]

    def score(self, attempts: Attempts, loss: Tensor) -> Tensor:
        return -self.distance(attempts, attempts["point"])

    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        assert grad is not None
        point = attempts["point"]
        unseen = attempts["unseen"]
        fooled = self.fooled(logits, attempts)

        # What an attempt does next: go back towards the image; ask again, because the point was
        # expected to be misclassified, so asked about without gradient, and is not; or make a step.
        back = unseen & fooled
        again = unseen & ~fooled & attempts["crossed"] & ~grad.flatten(1).any(1)
        last = self.note_boundary(attempts, self.hyperplane_ball(attempts), logits, loss, grad)
        step = last & ~back & ~again
        pulled = where(back, attempts["clean"].lerp(point, self.beta), point)
        attempts["point"] = where(step, self._next_iterate(attempts), pulled)

        attempts["asked"] = torch.where(step | back | again, 0, attempts["asked"] + 1)
        attempts["crossed"] = torch.where(unseen, fooled, attempts["crossed"])
        attempts["unseen"] = step | again
        attempts["made"] = attempts["made"] + step
        attempts["finished"] = attempts["finished"] | (attempts["made"] >= self.steps)

    def _next_iterate(self, attempts: Attempts) -> Tensor:
        """(R, …) the mean of the overshot projections of point and image."""
        point = attempts["point"]
        clean = attempts["clean"]
        weight = attempts["weight"]
        value = attempts["value"]
        clean_value = value + (weight * (clean - point)).flatten(1).sum(1)

        ball = self.hyperplane_ball(attempts)
        from_point = ball.step_onto(point, weight, value)
        from_clean = ball.step_onto(clean, weight, clean_value)

        # A point that lies on the boundary, but for rounding on the wrong side of it, is its own
        # projection; the overshot projection of the image still leads across.
        near = ball.measure(from_point)
        far = ball.measure(from_clean)
        share = (near / divisor(near + far)).clamp(LEAST_SHARE, self.alpha_max)
        past_point = point + self.eta * from_point
        past_clean = clean + self.eta * from_clean
        return ball.clip(past_point.lerp(past_clean, column(share, clean)))

    def _random_start(self, attempts: Attempts) -> Tensor:
        """(R, …) a random point eps / 2 from the image, clipped to the box."""
        ball = self.hyperplane_ball(attempts)
        noise = ball.random_step(attempts["key"])
        size = divisor(ball.measure(noise))
        return ball.clip(ball.center + column(attempts["eps"] / 2 / size, noise) * noise)
