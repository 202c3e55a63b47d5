"""Auto-PGD: projected gradient ascent with momentum that shortens its steps by itself (Croce &
Hein, arXiv 2003.01690, algorithm 1)."""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ironmoe.attacks.aliases.declared import Only, Turned, declare
from ironmoe.attacks.attack import FixedRadiusAttack
from ironmoe.attacks.balls.abilities import SparseBall, StraightBall
from ironmoe.attacks.balls.ball import ball_of, norms_with
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Attempts, where
from ironmoe.attacks.losses import (
    Loss,
    TargetedLoss,
    get_targeted_loss,
    least_classes,
    targeted_margin,
)
from ironmoe.attacks.methods.parts.apgd_sparsity import Sparsity
from ironmoe.attacks.methods.parts.counts import all_other_classes, check_counts
from ironmoe.attacks.registry import register_attack

# The last movement has this share in the next one: 1 − α of the paper.
MOMENTUM = 0.25


class Schedule(Protocol):
    """How the steps of an attempt change on its way.

    The attempts' ``peak``, ``peak_loss`` and ``peak_grad`` tell it the best point so far, with its
    loss and gradient.
    """

    def start(self, attempts: Attempts) -> None:
        """Set ``point`` and what the schedule remembers."""

    def goes_back(self, attempts: Attempts, loss: Tensor) -> Tensor:
        """(R,) bool: the next step starts from the best point. It is called once after every
        answer, which gave ``loss`` (R,)."""

    def move(self, attempts: Attempts, point: Tensor, grad: Tensor) -> None:
        """Set the next ``point``, a step from ``point`` along the gradient there."""


@register_attack(
    summary="Projected gradient ascent that chooses its step lengths; `targets=9` is APGD-T.",
    source="2003.01690, 2103.01208",
    takes=("steps", "restarts"),
    names={
        "apgd-ce": {"loss": "ce"},
        "apgd-dlr": {"loss": "dlr"},
        "apgd-t": {"loss": "dlr", "targets": 9},
    },
)
class APGD(FixedRadiusAttack):
    """Auto-PGD and, with ``targets``, APGD-T (arXiv 2003.01690; in L1 arXiv 2103.01208): no step
    length to choose.

    Steps begin long. They get shorter for each example by itself when they no longer raise its
    loss, and the example then goes back to the best point that it has seen. ``Halving`` says how in
    Linf and L2, ``Sparsity`` in L1, where it also adapts how many pixels a step moves.

    The starting point is random, on the sphere and projected. N steps take N gradients; the
    official code takes one more, at the last point, and does not use it.

    Args (beyond those of ``Attack``):
        steps: gradient steps of each attempt, ≥ 0.
        loss: the name of a loss in ``losses.LOSSES``, or a callable (logits, labels) → (B,); with
            targets the name of one that has a targeted form, or a callable (logits, labels,
            targets) → (B,). None: "ce", and "dlr" with targets. The DLR loss needs 3 classes, the
            targeted one 4; for a model with fewer, APGD takes the (targeted) margin, the same loss
            without its scale.
        restarts: attempts from different starts, ≥ 1, at each target.
        rho: steps are halved where at most this share of those since the last checkpoint raised the
            loss, 0 … 1; not in L1.
        targets: how many of the likeliest wrong classes of the clean image are targets, one after
            another; 9 in AutoAttack. 0: no target, only away from the label.
        three_radii: in L1, search at 3 · eps, at 2 · eps and at eps, as AutoAttack does, with 30 %,
            30 % and 40 % of the steps.
        early_stop: stop working on an example once it is misclassified, as in ``PGD``.
    """

    needs = (StraightBall, SparseBall)

    aliases = declare(
        n_target_classes="targets",
        n_classes=Turned("targets", all_other_classes, 10),
        use_largereps="three_radii",
        topk=Only((None,), "in L1 the share of pixels that a step moves adapts by itself"),
    )

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        steps: int = 100,
        norm: str = "Linf",
        loss: str | Loss | TargetedLoss | None = None,
        restarts: int = 1,
        rho: float = 0.75,
        targets: int = 0,
        *,
        three_radii: bool = False,
        early_stop: bool = True,
        **options: Any,
    ) -> None:
        self.targets = targets
        super().__init__(model, eps, norm=norm, **options)
        check_counts(0, steps=steps, targets=targets)
        check_counts(1, restarts=restarts)
        if not 0 <= rho <= 1:
            raise ValueError(f"rho must be from 0 to 1, got {rho}")
        sparse = issubclass(ball_of(norm), SparseBall)
        if three_radii and not sparse:
            allowed = " or ".join(map(repr, norms_with(SparseBall)))
            raise ValueError(f"three_radii=True goes with norm={allowed} alone, got norm={norm!r}")

        loss = loss or ("dlr" if targets else self.goal.usual_loss)
        if isinstance(loss, str):
            self.loss_name = loss
        else:
            self.loss_name = getattr(loss, "__name__", type(loss).__name__)
        self.loss_of: Loss | None = None
        self.targeted_loss_of: TargetedLoss | None = None
        if targets:
            self.targeted_loss_of = get_targeted_loss(cast(str | TargetedLoss, loss))
        else:
            self.loss_of = self.goal.chosen_loss(cast(str | Loss, loss))
            self._raised = self.goal.loss_named(cast(str | Loss, loss))
            self._margin = self.goal.losses.get("margin")

        self.steps = steps
        self.restarts = restarts
        self.max_queries = steps
        self.early_stop = early_stop
        self.keeps = "first" if early_stop else "best"
        self.rho = rho
        self.three_radii = three_radii
        self.inside = not three_radii
        self.schedule: Schedule
        if sparse:
            self.schedule = Sparsity(steps, self.ball, three_radii=three_radii)
        else:
            self.schedule = Halving(steps, rho, self._straight_ball)

    def __repr__(self) -> str:
        extras = f", targets={self.targets}" if self.targets else ""
        extras += "" if self.inside else ", three_radii"
        return (
            f"APGD({self.norm}, eps={self.eps_text}, steps={self.steps}, "
            f"loss={self.loss_name}{extras}, restarts={self.restarts}, seed={self.seed})"
        )

    def chosen_settings(self) -> dict[str, Any]:
        hidden = {"loss_name", "targeted_loss_of", "schedule"}
        if issubclass(ball_of(self.norm), SparseBall):
            hidden.add("rho")  # ``Sparsity`` has no use for it
        settings = super().chosen_settings()
        chosen = {name: value for name, value in settings.items() if name not in hidden}
        return chosen | {"loss": self.targeted_loss_of or self.loss_of}

    @property
    def classes_needed(self) -> int:
        loss = self.loss_of or self.targeted_loss_of
        assert loss is not None
        return max(least_classes(loss), self.targets + 1)

    def _straight_ball(self, attempts: Attempts) -> StraightBall:
        return cast(StraightBall, self.ball(attempts))

    def start(self, attempts: Attempts) -> None:
        self.schedule.start(attempts)
        clean = attempts["clean"]
        attempts["peak"] = attempts["point"]
        attempts["peak_grad"] = torch.zeros_like(clean)
        attempts["peak_loss"] = torch.full_like(attempts["eps"], float("-inf"), dtype=clean.dtype)
        attempts["finished"] = torch.full_like(attempts["finished"], self.steps == 0)

    def loss(self, logits: Tensor, attempts: Attempts) -> Tensor:
        if self.targeted_loss_of is None:
            assert self.loss_of is not None
            too_few = self._margin is not None and _has_too_few_classes(logits, self.loss_of)
            raised = self._margin if too_few and self._margin is not None else self._raised
            return self.signed(raised(logits, attempts["label"]))

        too_few = _has_too_few_classes(logits, self.targeted_loss_of)
        targeted_loss_of = targeted_margin if too_few else self.targeted_loss_of
        return targeted_loss_of(logits, attempts["label"], attempts["target"])

    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        assert grad is not None
        loss = loss.to(attempts["peak_loss"].dtype)
        grad = grad.to(attempts["clean"].dtype)

        higher = loss > attempts["peak_loss"]
        attempts["peak_loss"] = torch.where(higher, loss, attempts["peak_loss"])
        attempts["peak"] = where(higher, attempts["point"], attempts["peak"])
        attempts["peak_grad"] = where(higher, grad, attempts["peak_grad"])

        back = self.schedule.goes_back(attempts, loss)
        self.schedule.move(
            attempts,
            where(back, attempts["peak"], attempts["point"]),
            where(back, attempts["peak_grad"], grad),
        )
        attempts["finished"] = attempts["finished"] | (attempts["queries"] >= self.steps)

    def score(self, attempts: Attempts, loss: Tensor) -> Tensor:
        """The loss; −∞ for points of a search at a larger radius."""
        if self.inside:
            return loss
        return torch.where(attempts["radius"] <= attempts["eps"], loss, float("-inf"))


def _has_too_few_classes(logits: Tensor, loss: Loss | TargetedLoss) -> bool:
    """Whether the (targeted) margin takes the place of a loss that needs three classes or more."""
    least = least_classes(loss)
    return least > 2 and logits.shape[1] < least


class Halving:
    """Steps of 2 · eps with momentum, halved at checkpoints: the schedule of arXiv 2003.01690,
    Algorithm 1, in Linf and L2.

    Checkpoints come after 22, 41, 57, 70, 80, 87, 93 and 99 % of the steps. There an example's
    steps are halved, and it goes back to its best point, if since the last checkpoint

    1. at most ``rho`` of its steps raised the loss (the paper says "less than"; its code does
       this), or
    2. its best loss did not rise, and its steps were not halved at the last checkpoint. This does
       not apply to the first checkpoint, since there is no last one.

    The first step counts as a rise if it raised the loss of the start; the official code compares
    it with 0. As there, the movement that momentum carries over a return is the one from the point
    before to the best point.

    Args:
        steps: of an attempt.
        rho: see 1.
        ball: gives the ball of some attempts.
    """

    def __init__(self, steps: int, rho: float, ball: Callable[[Attempts], StraightBall]) -> None:
        self.rho = rho
        self.ball = ball
        # How many steps the first window has, by how many each window is shorter than the one
        # before it, and how many the shortest has.
        self.first = max(int(0.22 * steps), 1)
        self.shrinks = max(int(0.03 * steps), 1)
        self.least = max(int(0.06 * steps), 1)

    def start(self, attempts: Attempts) -> None:
        ball = self.ball(attempts)
        point = ball.project(ball.random_sphere_point(attempts["key"]))
        attempts["point"] = point
        attempts["before"] = point
        attempts["alpha"] = 2 * attempts["eps"]

        attempts["window"] = torch.full_like(attempts["key"], self.first)
        # Answers until the next checkpoint; the first one is about the start.
        attempts["left"] = attempts["window"] + 1
        attempts["rises"] = torch.zeros_like(attempts["key"])
        highest = torch.full_like(attempts["eps"], float("inf"), dtype=attempts["clean"].dtype)
        attempts["last_loss"] = highest
        attempts["checked_loss"] = highest
        attempts["halved"] = torch.ones_like(attempts["finished"])

    def goes_back(self, attempts: Attempts, loss: Tensor) -> Tensor:
        rises = attempts["rises"] + (loss > attempts["last_loss"])
        left = attempts["left"] - 1
        due = left == 0

        few_rises = rises <= self.rho * attempts["window"]
        stuck = ~attempts["halved"] & (attempts["peak_loss"] <= attempts["checked_loss"])
        halve = few_rises | stuck

        attempts["alpha"] = torch.where(due & halve, attempts["alpha"] / 2, attempts["alpha"])
        attempts["halved"] = torch.where(due, halve, attempts["halved"])
        attempts["checked_loss"] = torch.where(due, attempts["peak_loss"], attempts["checked_loss"])
        shorter = (attempts["window"] - self.shrinks).clamp_min(self.least)
        attempts["window"] = torch.where(due, shorter, attempts["window"])
        attempts["left"] = torch.where(due, attempts["window"], left)
        attempts["rises"] = rises.masked_fill(due, 0)
        attempts["last_loss"] = loss
        return due & halve

    def move(self, attempts: Attempts, point: Tensor, grad: Tensor) -> None:
        ball = self.ball(attempts)
        ahead = ball.step(point, grad, attempts["alpha"])
        behind = point - attempts["before"]
        swung = ball.pull_in(point + (1 - MOMENTUM) * (ahead - point) + MOMENTUM * behind)
        first = attempts["queries"] == 1  # there is no movement before the first step
        attempts["point"] = where(first, ahead, swung)
        attempts["before"] = point
