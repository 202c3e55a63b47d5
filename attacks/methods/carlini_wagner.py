"""CW: it looks for the smallest L2 change that fools the model by minimising a sum of distance and
margin (Carlini & Wagner, arXiv 1608.04644, section V-B)."""

import math
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.aliases.declared import Only, declare
from ironmoe.attacks.attack import LeastDistanceAttack
from ironmoe.attacks.balls.ball import Ball
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.balls.l2 import L2Ball
from ironmoe.attacks.balls.lengths import divisor
from ironmoe.attacks.engine.attacked_model import Answer, Model
from ironmoe.attacks.engine.attempts import Attempts, where
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.registry import register_attack
from ironmoe.kernels.attack_step import column

# Images move away from the faces of the box by this factor, since w would be infinite there.
SHRINK = 1 - 1e-6
# Adam averages gradients and their squares with these weights, and adds the last number to the root
# of the squares.
MEAN_DECAY = 0.9
SQUARE_DECAY = 0.999
ADAM_EPSILON = 1e-8
# A search step checks so many times whether the objective still falls. It goes on if the objective
# is at most this share of what it was at the last check.
CHECKS = 10
PROGRESS = 0.9999


@register_attack(
    summary="Looks for the least change by minimising distance and margin together.",
    source="1608.04644",
    takes=("steps",),
    names={"cw": {}},
)
class CW(LeastDistanceAttack):
    """Carlini & Wagner's L2 attack (arXiv 1608.04644, section V): each image gets the nearest
    misclassified point it can find.

    Adam minimises ‖x − clean‖² + c · max(κ − margin(x), 0), the margin being the best wrong logit
    minus the right one, over w with x = tanh(w) scaled to ``bounds``: no point leaves the box. A
    binary search finds c for each image: ten times larger as long as nothing was found, then the
    middle between the largest that failed and the smallest that succeeded. Lengths count in units
    of the range of ``bounds``, so that c means the same for any bounds; results are in units of
    ``bounds`` as always.

    Every image has its own Adam, its own c and its own end. A search step ends early if its
    objective did not fall by 0.01 % over a tenth of its steps; not with ``levels``.

    Another goal than a class must have a loss "margin", which takes the place of the margin above.

    A routing mode may add a term to the margin. Adam minimises with it; whether κ is reached, and
    so the search for c, is a matter of the logits alone.

    The paper's code takes 10,000 steps for each c. For the single c of torchattacks: ``c=1,
    steps=50, search_steps=1``.

    Args (beyond those of ``Attack``; ``norm`` is "L2"):
        eps: largest distance that counts as a success; infinity by default.
        c: the first weight of the margin, above 0.
        confidence: the margin κ ≥ 0 that points must reach. Short of it the most confident
            misclassified point is taken.
        steps: gradients for each c, ≥ 1.
        lr: Adam's, in units of w.
        search_steps: values of c tried, ≥ 1.
        early_stop: leave at the first misclassified point within eps, instead of looking for the
            nearest one.
    """

    needs = L2Ball
    needs_a_box = True

    aliases = declare(
        kappa="confidence",
        max_iterations="steps",
        learning_rate="lr",
        binary_search_steps="search_steps",
        initial_const="c",
        abort_early=Only((True,), "a search step always ends where its objective stays"),
        boxmin=Only((), "give bounds=(lowest, highest)"),
        boxmax=Only((), "give bounds=(lowest, highest)"),
        batch_size=Only((), "give it to evaluate, or give attack.run one batch"),
    )

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = math.inf,
        c: float = 1e-3,
        confidence: float = 0.0,
        steps: int = 1000,
        lr: float = 0.01,
        search_steps: int = 9,
        norm: str = "L2",
        bounds: Bounds = (0.0, 1.0),
        seed: int = 0,
        *,
        early_stop: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, norm=norm, bounds=bounds, seed=seed, **options)
        if "margin" not in self.goal.losses:
            raise ValueError(
                "goal must have a loss 'margin' for CW, whose sign tells a success, got "
                f"{self.goal}"
            )
        for name, value in {"c": c, "lr": lr}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}")
        check_counts(1, steps=steps, search_steps=search_steps)
        if not 0 <= confidence < math.inf:
            raise ValueError(f"confidence must be at least 0 and finite, got {confidence}")

        self._margin = self.goal.losses["margin"]
        self.c = c
        self.confidence = confidence
        self.steps = steps
        self.lr = lr
        self.search_steps = search_steps
        self.early_stop = early_stop
        self.keeps = "first" if early_stop else "best"
        self.max_queries = search_steps * steps

    def __repr__(self) -> str:
        return (
            f"CW(L2, eps={self.eps_text}, c={self.c}, steps={self.steps}, "
            f"search_steps={self.search_steps})"
        )

    def start(self, attempts: Attempts) -> None:
        eps = attempts["eps"]
        ball = self.ball(attempts)
        attempts["w"] = _to_w(ball)
        attempts["mean"] = torch.zeros_like(attempts["clean"])  # Adam's averages
        attempts["square"] = torch.zeros_like(attempts["clean"])

        # The search for c: the present value, the largest that failed, the smallest that reached
        # the confidence, and how many values are done.
        attempts["c"] = torch.full_like(eps, self.c)
        attempts["failed_c"] = torch.zeros_like(eps)
        attempts["reached_c"] = torch.full_like(eps, math.inf)
        attempts["search"] = torch.zeros_like(attempts["key"])

        # With the present c: how many answers there were, whether the confidence was reached, the
        # objective at the last check, and what a routing mode added to the margin last.
        attempts["step"] = torch.zeros_like(attempts["key"])
        attempts["reached"] = torch.zeros_like(attempts["finished"])
        attempts["checked"] = torch.full_like(eps, math.inf)
        attempts["added"] = torch.zeros_like(eps)

        attempts["point"] = _to_image(attempts["w"], ball)
        attempts["finished"] = torch.full_like(attempts["finished"], self.max_queries == 1)

    def loss(self, logits: Tensor, attempts: Attempts) -> Tensor:
        return self.signed(self._margin(logits, attempts["label"]))

    def objective(self, logits: Tensor, attempts: Attempts) -> Tensor:
        """The margin as far as it counts: beyond κ only the distance matters."""
        return super().objective(logits, attempts).clamp_max(self.confidence)

    def ask(self, attempts: Attempts, want_grad: bool) -> Answer:
        """The loss of an answer is the margin of its logits, by which points are judged. What a
        routing mode adds to it goes to ``added``."""
        answer = super().ask(attempts, want_grad)
        loss = self.objective(answer.logits, attempts)
        attempts["added"] = (answer.loss - loss).to(attempts["added"].dtype)
        return answer._replace(loss=loss)

    def score(self, attempts: Attempts, loss: Tensor) -> Tensor:
        """Above 0 at margin κ, falling with the distance; below 0 what the margin lacks."""
        near = 1 / (1 + self.distance(attempts, attempts["point"]))
        return torch.where(loss >= self.confidence, near, (loss - self.confidence).double())

    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        assert grad is not None
        ball = self.ball(attempts)
        change = ball.in_units(attempts["point"] - attempts["clean"]) / _range(ball)
        lacking = self.confidence - loss - attempts["added"]
        total = change.flatten(1).double().square().sum(1) + attempts["c"] * lacking
        reached = self.fooled(logits, attempts) & (loss >= self.confidence)
        attempts["reached"] = attempts["reached"] | reached

        check = attempts["step"] % max(self.steps // CHECKS, 1) == 0
        stuck = check & (total > PROGRESS * attempts["checked"])
        if self.levels is not None:  # on a grid the margin stands still until a pixel jumps
            stuck = torch.zeros_like(stuck)
        attempts["checked"] = torch.where(check, total, attempts["checked"])
        attempts["step"] = attempts["step"] + 1

        # In units of the range, as the distance; x = middle + width / 2 · tanh(w).
        slope = ball.in_units(2 * change) * (ball.width / _range(ball))
        slope = slope - column(attempts["c"], change) * ball.width * grad
        self._adam(attempts, slope * attempts["w"].cosh().square().reciprocal() / 2)
        self._next_c(attempts, ball, stuck | (attempts["step"] >= self.steps))
        attempts["point"] = _to_image(attempts["w"], ball)
        made = attempts["search"] * self.steps + attempts["step"]
        attempts["finished"] = attempts["finished"] | (made >= self.max_queries - 1)

    def _adam(self, attempts: Attempts, grad: Tensor) -> None:
        """One step downwards (Kingma & Ba, arXiv 1412.6980, algorithm 1)."""
        step = attempts["step"].double()
        attempts["mean"] = MEAN_DECAY * attempts["mean"] + (1 - MEAN_DECAY) * grad
        attempts["square"] = SQUARE_DECAY * attempts["square"] + (1 - SQUARE_DECAY) * grad.square()
        mean = attempts["mean"] / column(1 - MEAN_DECAY**step, grad)
        square = attempts["square"] / column(1 - SQUARE_DECAY**step, grad)
        attempts["w"] = attempts["w"] - self.lr * mean / (square.sqrt() + ADAM_EPSILON)

    def _next_c(self, attempts: Attempts, ball: Ball, done: Tensor) -> None:
        """Attempts that are ``done`` with their c get another, and begin again at the image."""
        reached = done & attempts["reached"]
        failed = done & ~attempts["reached"]
        attempts["reached_c"] = torch.where(reached, attempts["c"], attempts["reached_c"])
        attempts["failed_c"] = torch.where(failed, attempts["c"], attempts["failed_c"])

        bracketed = attempts["reached_c"] < math.inf
        middle = (attempts["failed_c"] + attempts["reached_c"]) / 2
        other = torch.where(bracketed, middle, 10 * attempts["c"])
        attempts["c"] = torch.where(done, other, attempts["c"])

        attempts["search"] = attempts["search"] + done
        attempts["reached"] = attempts["reached"] & ~done
        attempts["checked"] = torch.where(done, math.inf, attempts["checked"])
        attempts["step"] = torch.where(done, 0, attempts["step"])
        attempts["w"] = where(done, _to_w(ball), attempts["w"])
        nothing = torch.zeros_like(attempts["mean"])
        attempts["mean"] = where(done, nothing, attempts["mean"])
        attempts["square"] = where(done, nothing, attempts["square"])


def _to_w(ball: Ball) -> Tensor:
    """(R, …) w of the images."""
    low, high = ball.bounds
    width = divisor(ball.width) if isinstance(ball.width, Tensor) else ball.width
    return ((2 * ball.center - low - high) / width * SHRINK).atanh()


def _to_image(w: Tensor, ball: Ball) -> Tensor:
    low, high = ball.bounds
    return ball.clip((low + high) / 2 + (high - low) / 2 * w.tanh())


def _range(ball: Ball) -> float | Tensor:
    """The pixel range; where each element has its own, the largest of an image, (R, 1, …)."""
    if not isinstance(ball.width, Tensor):
        return ball.width
    return column(divisor(ball.widest), ball.center)
