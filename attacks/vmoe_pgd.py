"""The attack of the V-MoE robustness paper (arXiv 2210.10253), as its official code runs it."""

import torch
from torch import Tensor, nn

from ironmoe.attacks.attack import Attack, Model
from ironmoe.attacks.balls import Ball, Bounds, LinfBall
from ironmoe.attacks.losses import Loss, get_loss
from ironmoe.moe import aux_loss_in_eval, collect_aux_loss


class VMoEPGD(Attack):
    """Sign ascent on the mean loss of the batch: ``steps`` steps of length eps / steps from the image, the last point taken.

    No random start, no restarts and no clipping to the valid pixels: with steps that add up to eps the ball needs no projection
    (rounding beyond eps, 10⁻⁷, is taken back at the end). Every image of the batch is attacked, misclassified ones too, all the
    way: under a capacity images of a group influence each other, so the groups must stay as they are. It is weaker than ``PGD``.

    Made by ``PGD.vmoe``.
    """

    whole_batch = True

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 1 / 127.5,
        steps: int = 40,
        *,
        loss: str | Loss = "ce",
        auxiliary_loss: bool = False,
        bounds: Bounds = (-1.0, 1.0),
    ) -> None:
        super().__init__(model, eps, norm="Linf", bounds=bounds)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if auxiliary_loss and not (
            isinstance(model, nn.Module) and any(hasattr(m, "aux_loss_in_eval") for m in model.modules())
        ):
            raise ValueError("auxiliary_loss needs a model with TopKRouters, whose losses it ascends")
        self.steps, self.loss, self.auxiliary_loss = steps, get_loss(loss), auxiliary_loss

    def __repr__(self) -> str:
        return f"PGD.vmoe(Linf, eps={self.eps}, steps={self.steps}, auxiliary_loss={self.auxiliary_loss})"

    def _ball(self, center: Tensor, eps: Tensor) -> Ball:
        return LinfBall(center, eps, (float("-inf"), float("inf")))

    def _search(self, ball: Ball, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points = ball.center
        for _ in range(self.steps):
            points = ball.ascend(points, self._gradient(points, labels), ball.eps / self.steps)
        passes = torch.full_like(labels, self.steps)
        return ball.tighten(points), passes, passes

    def _gradient(self, points: Tensor, labels: Tensor) -> Tensor:
        points = points.detach().requires_grad_()
        if self.auxiliary_loss:
            assert isinstance(self.model, nn.Module)
            with aux_loss_in_eval(self.model):
                logits = self._logits(points, labels)
                auxiliary = collect_aux_loss(self.model)
        else:
            logits, auxiliary = self._logits(points, labels), torch.zeros(())
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = self.loss(logits.to(wide), labels).mean() + auxiliary.to(logits.device, wide)
        (grad,) = torch.autograd.grad(total, [points])
        if bool(grad.isnan().any()):
            raise ValueError("model must have finite input gradients, got NaN")
        return grad
