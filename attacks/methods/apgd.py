"""Auto-PGD: projected gradient ascent with momentum whose step length looks after itself (Croce &
Hein, arXiv 2003.01690)."""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ironmoe.attacks.attack import FixedRadiusAttack
from ironmoe.attacks.balls.balls import Ball
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Attempts, where
from ironmoe.attacks.losses import (
    Loss,
    TargetedLoss,
    dlr,
    get_loss,
    get_targeted_loss,
    margin,
    targeted_dlr,
    targeted_margin,
)
from ironmoe.attacks.methods.apgd_l1 import Sparsity
from ironmoe.attacks.random import normal, uniform
from ironmoe.kernels.attack_step import column

MOMENTUM = 0.25  # share of the last movement in the next one: 1 − α of the paper


class Schedule(Protocol):
    """How the steps of an attempt change on its way.

    It finds the best point so far, with its loss and gradient, in the rows' ``peak``, ``peak_loss``
    and ``peak_grad``.
    """

    def start(self, attempts: Attempts) -> None:
        """Set ``point`` and what the schedule remembers."""

    def goes_back(self, attempts: Attempts, loss: Tensor) -> Tensor:
        """(R,) bool: the next step starts from the best point. Asked once after every answer, which
        gave ``loss`` (R,)."""

    def move(self, attempts: Attempts, point: Tensor, grad: Tensor) -> None:
        """Set the next ``point``, a step from ``point`` along the gradient there."""


class APGD(FixedRadiusAttack):
    """Auto-PGD and, with ``targets``, APGD-T (arXiv 2003.01690; in L1 arXiv 2103.01208): no step
    length to choose.

    Steps begin long, and get shorter for each example by itself when they no longer raise its loss;
    it then goes back to the best point it has seen. ``Halving`` says how in Linf and L2,
    ``Sparsity`` in L1, where the steps' sparsity adapts, too.

    Beginnings are random, on the sphere and clamped to the box. N steps take N gradients; the
    official code takes one more, at the last point, and does not use it.

    Args (beyond those of ``Attack``):
        steps: gradient steps of each attempt, ≥ 0.
        loss: "ce", "margin", "dlr", "sigmoid", or a callable (logits, labels) → (B,). With targets
            "dlr", "margin", "ce", or a callable (logits, labels, targets) → (B,). None: "ce", and
            "dlr" with targets. The DLR loss needs 3 classes, the targeted one 4; a model with fewer
            gets the (targeted) margin, the same loss without its scale.
        restarts: attempts from different starts, ≥ 1, at each target.
        rho: steps are halved where at most this share of those since the last checkpoint raised the
            loss, 0 … 1; not in L1.
        targets: how many of the likeliest wrong classes of the clean image are made for in turn, 9
            in AutoAttack; 0: none, just away from the label.
        three_radii: in L1, search at 3 · eps, at 2 · eps and at eps, as AutoAttack does, with 30 %,
            30 % and 40 % of the steps.
        early_stop: stop working on an example once it is misclassified, as in ``PGD``.
    """

    norms: tuple[str, ...] = ("Linf", "L2", "L1")

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
        for name, value, least in (
            ("steps", steps, 0),
            ("restarts", restarts, 1),
            ("targets", targets, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= rho <= 1:
            raise ValueError(f"rho must be from 0 to 1, got {rho}")
        if three_radii and norm != "L1":
            raise ValueError(f"three_radii=True goes with norm='L1' alone, got norm={norm!r}")
        loss = loss or ("dlr" if targets else "ce")
        self.loss_name = (
            loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
        )
        self.loss_of = None if targets else get_loss(cast(str | Loss, loss))
        self.targeted_loss_of = (
            get_targeted_loss(cast(str | TargetedLoss, loss)) if targets else None
        )
        self.steps, self.restarts, self.max_queries = steps, restarts, steps
        self.keeps = "first" if early_stop else "best"
        self.rho = rho
        self.three_radii = three_radii
        self.inside = not three_radii
        self.schedule: Schedule = (
            Sparsity(steps, self.bounds, three_radii)
            if norm == "L1"
            else Halving(steps, rho, norm, self.ball)
        )

    def __repr__(self) -> str:
        extras = (f", targets={self.targets}" if self.targets else "") + (
            ", three_radii" if not self.inside else ""
        )
        return (
            f"APGD({self.norm}, eps={self.eps}, steps={self.steps}, loss={self.loss_name}{extras}, "
            f"restarts={self.restarts}, seed={self.seed})"
        )

    def chosen_settings(self) -> dict[str, Any]:
        hidden = {"loss_name", "loss_of", "targeted_loss_of", "schedule"}
        if self.norm == "L1":
            hidden.add("rho")  # the schedule in L1 has no use for it
        chosen = {
            name: value for name, value in super().chosen_settings().items() if name not in hidden
        }
        return chosen | {"loss": self.targeted_loss_of or self.loss_of}

    @property
    def classes_needed(self) -> int:
        ratio = 4 if self.targets else 3  # of logits that DLR takes
        return max(ratio if self.loss_name == "dlr" else 2, self.targets + 1)

    def start(self, attempts: Attempts) -> None:
        self.schedule.start(attempts)
        clean = attempts["clean"]
        attempts["peak"], attempts["peak_grad"] = attempts["point"], torch.zeros_like(clean)
        attempts["peak_loss"] = torch.full_like(attempts["eps"], float("-inf"), dtype=clean.dtype)
        attempts["finished"] = torch.full_like(attempts["finished"], self.steps == 0)

    def loss(self, logits: Tensor, attempts: Attempts) -> Tensor:
        if self.targeted_loss_of is None:
            assert self.loss_of is not None
            return (margin if self.loss_of is dlr and logits.shape[1] < 3 else self.loss_of)(
                logits, attempts["label"]
            )
        too_few = self.targeted_loss_of is targeted_dlr and logits.shape[1] < 4
        loss_of = targeted_margin if too_few else self.targeted_loss_of
        return loss_of(logits, attempts["label"], attempts["target"])

    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        assert grad is not None
        loss, grad = loss.to(attempts["peak_loss"].dtype), grad.to(attempts["clean"].dtype)
        higher = loss > attempts["peak_loss"]
        attempts["peak_loss"] = torch.where(higher, loss, attempts["peak_loss"])
        attempts["peak"], attempts["peak_grad"] = (
            where(higher, attempts["point"], attempts["peak"]),
            where(higher, grad, attempts["peak_grad"]),
        )
        back = self.schedule.goes_back(attempts, loss)
        self.schedule.move(
            attempts,
            where(back, attempts["peak"], attempts["point"]),
            where(back, attempts["peak_grad"], grad),
        )
        attempts["finished"] = attempts["finished"] | (attempts["queries"] >= self.steps)

    def score(self, attempts: Attempts, loss: Tensor) -> Tensor:
        """The loss; −∞ for points of a search at a larger radius."""
        return (
            loss
            if self.inside
            else torch.where(attempts["radius"] <= attempts["eps"], loss, float("-inf"))
        )


class Halving:
    """Steps of 2 · eps with momentum, halved at checkpoints: the schedule of arXiv 2003.01690,
    Algorithm 1, in Linf and L2.

    Checkpoints come after 22, 41, 57, 70, 80, 87, 93 and 99 % of the steps. There an example's
    steps are halved, and it goes back to its best point, if since the last checkpoint

    1. at most ``rho`` of its steps raised the loss (the paper has "less than"; this is its code),
        or
    2. its best loss did not rise, and its steps were not halved at the last checkpoint. Not at the
        first: there is no last one.

    The first step counts as a rise if it raised the loss of the start; the official code compares
    it with 0. As there, the movement that momentum carries over a return is the one from the point
    before to the best point.

    Args:
        steps: of an attempt.
        rho: see 1.
        norm: of the ball.
        ball: that of rows.
    """

    def __init__(self, steps: int, rho: float, norm: str, ball: Callable[[Attempts], Ball]) -> None:
        self.rho, self.norm, self.ball = rho, norm, ball
        # The first window, by how much each is shorter than the last, and the shortest.
        self.first, self.shrinks, self.least = (
            max(int(share * steps), 1) for share in (0.22, 0.03, 0.06)
        )

    def start(self, attempts: Attempts) -> None:
        clean, eps = attempts["clean"], attempts["eps"]
        if self.norm == "Linf":
            noise = 2 * uniform(attempts["key"], clean.shape[1:], clean.dtype) - 1
            length = noise.flatten(1).abs().amax(1)
        else:
            noise = normal(attempts["key"], clean.shape[1:], clean.dtype)
            length = noise.flatten(1).norm(dim=1)
        point = clean + column(eps / length.clamp_min(1e-12), clean) * noise
        attempts["point"] = attempts["before"] = self.ball(attempts).project(point)
        attempts["alpha"] = 2 * eps
        attempts["window"] = torch.full_like(attempts["label"], self.first)
        # answers until the next checkpoint; the first one is about the start
        attempts["left"] = attempts["window"] + 1
        attempts["rises"] = torch.zeros_like(attempts["label"])
        attempts["last_loss"] = attempts["checked_loss"] = torch.full_like(
            eps, float("inf"), dtype=clean.dtype
        )
        attempts["halved"] = torch.ones_like(attempts["finished"])

    def goes_back(self, attempts: Attempts, loss: Tensor) -> Tensor:
        rises, left = attempts["rises"] + (loss > attempts["last_loss"]), attempts["left"] - 1
        due = left == 0
        few_rises = rises <= self.rho * attempts["window"]
        stuck = ~attempts["halved"] & (attempts["peak_loss"] <= attempts["checked_loss"])
        halve = few_rises | stuck
        attempts["alpha"] = torch.where(due & halve, attempts["alpha"] / 2, attempts["alpha"])
        attempts["halved"] = torch.where(due, halve, attempts["halved"])
        attempts["checked_loss"] = torch.where(due, attempts["peak_loss"], attempts["checked_loss"])
        attempts["window"] = torch.where(
            due, (attempts["window"] - self.shrinks).clamp_min(self.least), attempts["window"]
        )
        attempts["left"] = torch.where(due, attempts["window"], left)
        attempts["rises"], attempts["last_loss"] = rises.masked_fill(due, 0), loss
        return due & halve

    def move(self, attempts: Attempts, point: Tensor, grad: Tensor) -> None:
        ball = self.ball(attempts)
        ahead = ball.step(point, grad, attempts["alpha"])
        swung = ball.project(
            point + (1 - MOMENTUM) * (ahead - point) + MOMENTUM * (point - attempts["before"])
        )
        attempts["point"] = where(attempts["queries"] == 1, ahead, swung)
        attempts["before"] = point
