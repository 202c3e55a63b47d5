"""N-FGSM (de Jorge et al., arXiv 2202.01181): one step from a noisy image, without a clip."""

from typing import Any

from torch import Tensor, nn

from ironmoe.attacks.training.checks import check_factor, check_one_step
from ironmoe.attacks.training.inner.attacks import n_fgsm
from ironmoe.attacks.training.method import Strength, TrainingMethod
from ironmoe.attacks.training.registry import register_training_method


@register_training_method(
    "n-fgsm",
    summary="Cross-entropy of images that one step from strong noise made, beyond eps.",
    cost="5",
    source="2202.01181",
    takes=("noise",),
    single_step=True,
)
class NFGSM(TrainingMethod):
    """CE(x′), x′ = x + noise + alpha · sign g(x + noise), inside the box alone: it may lie
    (noise + 1) · eps away from x.

    Args (beyond those of ``TrainingMethod``):
        noise: radius of the noise, in units of eps; k in the paper.
        alpha: by default eps.
        steps: must be 1.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        noise: float = 2.0,
        steps: int = 1,
        alpha: float | None = None,
        **options: Any,
    ) -> None:
        check_one_step(steps)
        check_factor(noise=noise)
        super().__init__(model, eps, steps=1, alpha=eps if alpha is None else alpha, **options)
        self.noise = float(noise)

    def _attack(self, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
        return n_fgsm(
            self.inner,
            images,
            labels,
            eps=strength.eps,
            alpha=strength.alpha,
            noise=self.noise,
        )
