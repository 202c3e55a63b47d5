"""Projected gradient descent and its relatives with one fixed step length."""

from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.attack import FixedRadiusAttack
from ironmoe.attacks.balls.balls import Bounds
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.losses import Loss, dlr, get_loss
from ironmoe.attacks.methods.fingerprint import fingerprint
from ironmoe.attacks.methods.vmoe_pgd import VMoEPGD
from ironmoe.attacks.result import AttackResult
from ironmoe.kernels.attack_step import column


class PGD(FixedRadiusAttack):
    """Steepest ascent with projection (Madry et al., arXiv 1706.06083): by the sign in Linf, the
    normalised gradient in L2, and the largest entries in L1.

    The image is kept in float32 and every step is projected exactly onto ball and box. With
    ``early_stop`` an example that is misclassified leaves the batch at once, which makes weak
    models cheap to evaluate; without it the search goes on, and of all
    points visited each example keeps the best: a misclassified one before any other, then the
        highest loss. The verdict is the same.

    In Linf an attempt that may stop early also ends when it comes back to a point where it has
    been: from there it would go round in a circle (arXiv 2503.19347). Nothing is lost but passes,
    as long as the model says the same thing twice.

    In a model with a capacity or with Expert Choice images influence each other: whole groups are
    attacked, and the best point of a group, for all its images at once, is kept.

    Args (beyond those of ``Attack``):
        alpha: step length in the units of eps; None is 2.5 · eps / steps (Madry's rule), but at
            least eps / 10,
            so that many steps do converge: in L2 a step of eps / n closes 1 / (n + 1) of the angle
                to the optimum.
        steps: gradient steps of each restart, ≥ 0.
        random_start: start from a random point of the ball instead of the image.
        loss: "ce", "margin", "dlr", "sigmoid", or a callable (logits, labels) → (B,).
        restarts: runs from different starts, ≥ 1; more than one needs ``random_start``.
        early_stop: stop working on an example once it is misclassified.
    """

    norms: tuple[str, ...] = ("Linf", "L2", "L1")

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | None = None,
        steps: int = 10,
        random_start: bool = True,
        norm: str = "Linf",
        loss: str | Loss = "ce",
        restarts: int = 1,
        bounds: Bounds = (0.0, 1.0),
        seed: int = 0,
        *,
        early_stop: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, norm=norm, bounds=bounds, seed=seed, **options)
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        if restarts < 1 or (restarts > 1 and not random_start):
            raise ValueError(
                f"restarts must be 1, or more with random_start, got {restarts} with "
                f"random_start={random_start}"
            )
        if alpha is not None and not (isinstance(alpha, int | float) and alpha >= 0):
            raise ValueError(f"alpha must be a number, at least 0, or None, got {alpha}")
        self.alpha, self.steps, self.random_start = alpha, steps, random_start
        self.loss_of, self.restarts, self.early_stop = get_loss(loss), restarts, early_stop
        self.starts_clean = not random_start
        self.keeps = "first" if early_stop else "best"
        self.max_queries = steps
        self._circles = (
            early_stop and steps > 0 and norm == "Linf" and self.eot == 1 and not self.coupled
        )

    @staticmethod
    def vmoe(
        model: Model,
        eps: float | Tensor = 1 / 127.5,
        steps: int = 40,
        *,
        loss: str | Loss = "ce",
        auxiliary_loss: bool = False,
        bounds: Bounds = (-1.0, 1.0),
        **options: Any,
    ) -> VMoEPGD:
        """The V-MoE paper's attack (arXiv 2210.10253), as its official code runs it: ``VMoEPGD``.

        Args:
            model: takes images in ``bounds``, by default [−1, 1] as the official models; eps = k /
                127.5 is there k / 255 of the range.
            steps: of length eps / steps each.
            loss: "ce" (softmax), "sigmoid" (the JFT model's), or a callable (logits, labels) →
                (B,).
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
    ) -> "LastIteratePGD":
        """PGD as torchattacks 3.5 runs it (in Linf), to reproduce numbers: every image walks all
        the way, misclassified ones too, and the last point is the result; the start is drawn by
        torch's global generator, so that the same ``torch.manual_seed`` gives the same images.
        Weaker than ``PGD``, and its verdicts depend on the batch."""
        return LastIteratePGD(
            model, eps, alpha, steps, random_start, norm, early_stop=False, **options
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.norm}, eps={self.eps}, steps={self.steps}, "
            f"restarts={self.restarts}, seed={self.seed})"
        )

    def chosen_settings(self) -> dict[str, Any]:
        chosen = super().chosen_settings()
        return {name: chosen[name] for name in chosen if name != "loss_of"} | {"loss": self.loss_of}

    @property
    def classes_needed(self) -> int:
        return 3 if self.loss_of is dlr else 2

    def start(self, attempts: Attempts) -> None:
        attempts["point"] = (
            self.ball(attempts).random_point(attempts["key"])
            if self.random_start
            else attempts["clean"]
        )
        attempts["finished"] = torch.full_like(attempts["finished"], self.steps == 0)
        # Fingerprints of the points so far; 0 where there is none yet.
        columns = self.steps if self._circles else 0
        attempts["visited"] = torch.zeros(
            len(attempts["label"]), columns, dtype=torch.int64, device=attempts["label"].device
        )
        if self._circles:
            attempts["visited"][:, 0] = fingerprint(attempts["point"])

    def loss(self, logits: Tensor, attempts: Attempts) -> Tensor:
        return self.loss_of(logits, attempts["label"])

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
            attempts["visited"] = attempts["visited"].scatter(
                1, steps_made.clamp(max=self.steps - 1).unsqueeze(1), here
            )

    def direction(self, attempts: Attempts, grad: Tensor) -> Tensor:
        """What the step is taken along."""
        return grad

    def step_length(self, eps: Tensor) -> Tensor:
        if self.alpha is not None:
            return torch.full_like(eps, self.alpha)
        return max(2.5 / max(self.steps, 1), 0.1) * eps


class LastIteratePGD(PGD):
    """``PGD.torchattacks``."""

    attacks_wrong = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.keeps = "last"

    def run(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> AttackResult:
        result = super().run(images, labels, indices)
        if (
            self.random_start and self.norm == "Linf"
        ):  # the user's generator, which was put back, goes on as torchattacks leaves it
            torch.empty_like(result.adversarial).uniform_(-1, 1)
        return result

    def start(self, attempts: Attempts) -> None:
        super().start(attempts)
        if self.random_start and self.norm == "Linf":
            eps = column(attempts["eps"], attempts["clean"])
            attempts["point"] = (
                attempts["clean"] + eps * torch.empty_like(attempts["clean"]).uniform_(-1, 1)
            ).clamp(*self.bounds)


class FGSM(PGD):
    """One full step of length eps from the image (Goodfellow et al., arXiv 1412.6572); in L2 along
    the normalised gradient."""

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        norm: str = "Linf",
        loss: str | Loss = "ce",
        bounds: Bounds = (0.0, 1.0),
        **options: Any,
    ) -> None:
        super().__init__(model, eps, None, 1, False, norm, loss, 1, bounds, **options)

    def step_length(self, eps: Tensor) -> Tensor:
        return eps


class MIFGSM(PGD):
    """Momentum iterative FGSM (Dong et al., arXiv 1710.06081): steps along the decayed sum of
    L1-normalised gradients, from the image.

    Args (beyond those of ``Attack``):
        alpha: step length; None is eps / steps.
        decay: of the momentum, μ.
    """

    norms = ("Linf", "L2")

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | None = None,
        steps: int = 10,
        decay: float = 1.0,
        norm: str = "Linf",
        loss: str | Loss = "ce",
        bounds: Bounds = (0.0, 1.0),
        **options: Any,
    ) -> None:
        super().__init__(model, eps, alpha, steps, False, norm, loss, 1, bounds, **options)
        if not decay >= 0:
            raise ValueError(f"decay must be at least 0, got {decay}")
        self.decay = decay
        self._circles = False  # the momentum makes the same point another state

    def start(self, attempts: Attempts) -> None:
        super().start(attempts)
        attempts["momentum"] = torch.zeros_like(attempts["clean"])

    def direction(self, attempts: Attempts, grad: Tensor) -> Tensor:
        flat = grad.to(attempts["clean"].dtype).flatten(1)
        length = flat.abs().sum(1, keepdim=True)
        unit = torch.where(length > 0, flat / length, 0).view_as(grad)
        attempts["momentum"] = self.decay * attempts["momentum"] + unit
        return attempts["momentum"]

    def step_length(self, eps: Tensor) -> Tensor:
        return (
            torch.full_like(eps, self.alpha) if self.alpha is not None else eps / max(self.steps, 1)
        )
