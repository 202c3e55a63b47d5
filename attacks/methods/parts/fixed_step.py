"""What PGD, FGSM and MI-FGSM share: steps of one length along the gradient, each projected onto
ball and box."""

from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.aliases.declared import Only, declare
from ironmoe.attacks.attack import FixedRadiusAttack
from ironmoe.attacks.balls.ball import ball_of
from ironmoe.attacks.balls.checked import warn_of_step
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.losses import Loss, least_classes
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.methods.parts.fingerprint import fingerprint


class FixedStepAttack(FixedRadiusAttack):
    """Steepest ascent with projection; a subclass says how long a step is and what it goes along.

    In a norm whose steps come back, an attempt that may stop early also ends when it meets a point
    where it has been: from there it would go round in a circle (arXiv 2503.19347). Nothing is lost
    but passes, as long as the model says the same thing twice.

    Args (beyond those of ``Attack``):
        steps: gradient steps of each restart, ≥ 0.
        random_start: start from a random point of the ball instead of the image.
        loss: the name of a loss of the goal, or a callable (outputs, labels) → (B,); None: the
            goal's usual one.
        restarts: runs from different starts, ≥ 1; more than one needs ``random_start``.
        early_stop: stop working on an example once it is misclassified; otherwise keep the best of
            all points.
        alpha: step length in the units of eps; None: what ``step_length`` says.
    """

    aliases = declare(
        eps_for_division=Only((1e-10,), "a gradient is scaled to length 1, however short it is"),
    )

    remembers = False
    """The next step depends on more than the point, so that a point met again is no circle."""

    def __init__(
        self,
        model: Model,
        eps: float | Tensor,
        *,
        steps: int,
        random_start: bool,
        loss: str | Loss | None,
        restarts: int = 1,
        early_stop: bool = True,
        alpha: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, **options)
        check_counts(0, steps=steps, restarts=restarts)
        if restarts < 1 or (restarts > 1 and not random_start):
            raise ValueError(
                f"restarts must be 1, or more with random_start, got {restarts} with "
                f"random_start={random_start}"
            )
        if alpha is not None and not (isinstance(alpha, int | float) and alpha >= 0):
            raise ValueError(f"alpha must be a number, at least 0, or None, got {alpha}")

        warn_of_step(ball_of(self.norm), alpha, self.bounds)
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.loss_of = self.goal.chosen_loss(loss)
        self._raised = self.goal.loss_named(loss)
        self.restarts = restarts
        self.early_stop = early_stop
        self.starts_clean = not random_start
        self.keeps = "first" if early_stop else "best"
        self.max_queries = steps

        one_answer = self.eot == 1 and not self.coupled_by_model_or_loss and not self.remembers
        self._circles = (
            ball_of(self.norm).steps_come_back and early_stop and steps > 0 and one_answer
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.norm}, eps={self.eps_text}, steps={self.steps}, "
            f"restarts={self.restarts}, seed={self.seed})"
        )

    @property
    def classes_needed(self) -> int:
        return least_classes(self.loss_of)

    def start(self, attempts: Attempts) -> None:
        if self.random_start:
            attempts["point"] = self.ball(attempts).random_point(attempts["key"])
        else:
            attempts["point"] = attempts["clean"]
        attempts["finished"] = torch.full_like(attempts["finished"], self.steps == 0)

        # Fingerprints of the points so far; 0 where there is none yet.
        rows = len(attempts["key"])
        columns = self.steps if self._circles else 0
        attempts["visited"] = attempts["key"].new_zeros((rows, columns), dtype=torch.int64)
        if self._circles:
            attempts["visited"][:, 0] = fingerprint(attempts["point"])

    def loss(self, logits: Tensor, attempts: Attempts) -> Tensor:
        return self.signed(self._raised(logits, attempts["label"]))

    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        assert grad is not None
        steps_made = attempts["queries"]
        attempts["finished"] = attempts["finished"] | (steps_made >= self.steps)
        attempts["point"] = self.ball(attempts).step(
            attempts["point"], self.direction(attempts, grad), self.step_length(attempts["eps"])
        )

        if self._circles:  # where it has been it will go on as before
            here = fingerprint(attempts["point"]).unsqueeze(1)
            attempts["finished"] = attempts["finished"] | (attempts["visited"] == here).any(1)
            place = steps_made.clamp(max=self.steps - 1).unsqueeze(1)
            attempts["visited"] = attempts["visited"].scatter(1, place, here)

    def direction(self, attempts: Attempts, grad: Tensor) -> Tensor:
        """What the step goes along."""
        return grad

    def step_length(self, eps: Tensor) -> Tensor:
        """(R,) in the units of eps (R,): alpha, or what is usual without."""
        return (
            self.usual_step_length(eps) if self.alpha is None else torch.full_like(eps, self.alpha)
        )

    def usual_step_length(self, eps: Tensor) -> Tensor:
        """2.5 · eps / steps (Madry's rule), but at least eps / 10."""
        return max(2.5 / max(self.steps, 1), 0.1) * eps
