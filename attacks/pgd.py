"""Projected gradient descent and its one-step ancestor."""

import torch
from torch import Tensor, nn

from ironmoe.attacks.attack import Attack, Model
from ironmoe.attacks.balls import Ball, Bounds
from ironmoe.attacks.losses import Loss, get_loss
from ironmoe.attacks.random import example_keys
from ironmoe.attacks.vmoe_pgd import VMoEPGD
from ironmoe.moe.groups import Grouped


class PGD(Attack):
    """Steepest ascent with projection (Madry et al., arXiv 1706.06083), in Linf by the sign, in L2 by the normalised gradient.

    The image is kept in float32 and every step is projected exactly onto ball and box. Of all points visited, each example
    keeps the best: a misclassified one before any other, then the highest loss. Restarts go on only with examples not yet
    misclassified. With ``early_stop`` an example that is misclassified leaves the batch at once, which makes weak models cheap
    to evaluate; without it the search goes on to raise the loss. The verdict is the same.

    A model with a capacity or with Expert Choice lets images of a batch influence each other: there no image leaves the batch, so
    that every group stays what it was.

    Args (beyond those of ``Attack``):
        alpha: step length in the units of eps; None is 2.5 · eps / steps (Madry's rule), but at least eps / 10,
            so that many steps do converge: in L2 a step of eps / n closes 1 / (n + 1) of the angle to the optimum.
        steps: gradient steps of each restart, ≥ 0.
        random_start: start from a random point of the ball instead of the image.
        loss: "ce", "margin", "sigmoid", or a callable (logits, labels) → (B,).
        restarts: runs from different starts, ≥ 1; more than one needs ``random_start``.
        early_stop: stop working on an example once it is misclassified.
    """

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
        attack_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, eps, norm=norm, bounds=bounds, seed=seed, attack_dtype=attack_dtype)
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        if restarts < 1 or (restarts > 1 and not random_start):
            raise ValueError(f"restarts must be 1, or more with random_start, got {restarts} with random_start={random_start}")
        if alpha is not None and not alpha >= 0:
            raise ValueError(f"alpha must be at least 0 or None, got {alpha}")
        self.alpha, self.steps, self.random_start = alpha, steps, random_start
        self.loss, self.restarts = get_loss(loss), restarts
        self.whole_batch = _couples_images(model)
        self.early_stop = early_stop and not self.whole_batch

    @staticmethod
    def vmoe(
        model: Model,
        eps: float | Tensor = 1 / 127.5,
        steps: int = 40,
        *,
        loss: str | Loss = "ce",
        auxiliary_loss: bool = False,
        bounds: Bounds = (-1.0, 1.0),
    ) -> VMoEPGD:
        """The V-MoE paper's attack (arXiv 2210.10253), as its official code runs it: ``VMoEPGD``.

        Args:
            model: takes images in ``bounds``, by default [−1, 1] as the official models; eps = k / 127.5 is there k / 255 of the range.
            steps: of length eps / steps each.
            loss: "ce" (softmax), "sigmoid" (the JFT model's), or a callable (logits, labels) → (B,).
            auxiliary_loss: ascend the mean of the loss plus the routers' auxiliary losses.
        """
        return VMoEPGD(model, eps, steps, loss=loss, auxiliary_loss=auxiliary_loss, bounds=bounds)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.norm}, eps={self.eps}, steps={self.steps}, restarts={self.restarts}, seed={self.seed})"

    def _search(self, ball: Ball, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best = _Best(ball.center, labels)
        for restart in range(self.restarts):
            rows = (~best.fooled | self.whole_batch).nonzero().squeeze(1)
            if len(rows):
                self._climb(ball[rows], labels[rows], example_keys(self.seed, indices[rows], restart), rows, best)
            if self.attack_dtype is not None:  # what only the low precision takes for a success goes into the next restart
                best.fooled &= self._predict(best.points, labels) != labels
                best.forwards += 1
        return ball.tighten(best.points), best.forwards, best.backwards

    def _climb(self, ball: Ball, labels: Tensor, keys: Tensor, rows: Tensor, best: "_Best") -> None:
        """One restart of the examples ``rows``."""
        points = ball.random_point(keys) if self.random_start else ball.center
        for step in range(self.steps + 1):
            last = step == self.steps
            loss, fooled, grad = self._loss_and_grad(points, labels, want_grad=not last)
            best.count(rows, backward=not last)
            if step > 0 or self.random_start:  # the clean image is no candidate
                best.offer(rows, points, loss, fooled)
            if self.early_stop and bool(fooled.any()):
                keep = ~fooled
                ball, labels, rows, points, grad = ball[keep], labels[keep], rows[keep], points[keep], grad[keep]
            if last or len(rows) == 0:
                return
            points = ball.step(points, grad, self._step_length(ball.eps))

    def _step_length(self, eps: Tensor) -> Tensor:
        if self.alpha is not None:
            return torch.full_like(eps, self.alpha)
        return max(2.5 / self.steps, 0.1) * eps

    def _loss_and_grad(self, points: Tensor, labels: Tensor, want_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(loss (B,), misclassified (B,), gradient of the loss; zeros if not wanted)."""
        points = points.detach().requires_grad_(want_grad)
        device = points.device.type
        with (
            torch.set_grad_enabled(want_grad),
            torch.autocast(device, enabled=self.attack_dtype is not None, dtype=self.attack_dtype),
        ):
            logits = self._logits(points, labels)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        with torch.set_grad_enabled(want_grad):
            loss = self.loss(logits, labels)
        if loss.shape != labels.shape:
            raise ValueError(f"loss must return one value an example, shape ({len(labels)},), got {tuple(loss.shape)}")
        fooled = logits.argmax(1) != labels
        if not want_grad:
            return loss, fooled, torch.zeros_like(points)
        if not loss.requires_grad:
            raise ValueError("model must be differentiable with respect to its images, got logits without a graph")
        (grad,) = torch.autograd.grad(loss.sum(), [points])
        if bool(grad.isnan().any()):
            raise ValueError(
                f"model must have finite input gradients, got NaN for {int(grad.flatten(1).isnan().any(1).sum())} examples"
            )
        return loss.detach(), fooled, grad


class FGSM(PGD):
    """One full step of length eps from the image (Goodfellow et al., arXiv 1412.6572); in L2 along the normalised gradient."""

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        norm: str = "Linf",
        loss: str | Loss = "ce",
        bounds: Bounds = (0.0, 1.0),
        *,
        attack_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, eps, None, 1, False, norm, loss, 1, bounds, early_stop=False, attack_dtype=attack_dtype)

    def _step_length(self, eps: Tensor) -> Tensor:
        return eps


def _couples_images(model: Model) -> bool:
    return isinstance(model, nn.Module) and any(isinstance(module, Grouped) for module in model.modules())


class _Best:
    """The best point each example has seen, and what it cost."""

    def __init__(self, points: Tensor, labels: Tensor) -> None:
        self.points = points.clone()
        self.loss = torch.full(labels.shape, float("-inf"), dtype=points.dtype, device=points.device)
        self.fooled = torch.zeros_like(labels, dtype=torch.bool)
        self.forwards, self.backwards = torch.zeros_like(labels), torch.zeros_like(labels)

    def count(self, rows: Tensor, backward: bool) -> None:
        self.forwards[rows] += 1
        self.backwards[rows] += int(backward)

    def offer(self, rows: Tensor, points: Tensor, loss: Tensor, fooled: Tensor) -> None:
        """A misclassified point beats one that is not; among equals the higher loss wins."""
        was_fooled = self.fooled[rows]
        better = (fooled & ~was_fooled) | ((fooled == was_fooled) & (loss > self.loss[rows]))
        rows = rows[better]
        self.points[rows] = points.detach()[better]
        self.loss[rows] = loss[better].to(self.loss.dtype)
        self.fooled[rows] = fooled[better]
