"""FGSM from a random start (Wong et al., arXiv 2001.03994): one step in place of many."""

from typing import Any

from torch import nn

from ironmoe.attacks.training.checks import check_one_step
from ironmoe.attacks.training.methods.pgd_at import PGDAT
from ironmoe.attacks.training.registry import register_training_method


@register_training_method(
    "fgsm-rs",
    summary="Cross-entropy of images that one step from a random start made.",
    cost="5",
    source="2001.03994",
    single_step=True,
)
class FGSMRS(PGDAT):
    """CE(x′), x′ by one step of ``alpha``, by default 1.25 · eps, from a uniform start, projected
    back onto ball and box.

    A model may learn to answer this one step and lose all its robustness within an epoch
    (catastrophic overfitting): let ``OverfittingGuard`` look. ``start="clean"`` with ``alpha=eps``
    is plain FGSM, to which it happens much sooner.

    Args: those of ``PGDAT``; ``steps`` must be 1.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        steps: int = 1,
        alpha: float | None = None,
        **options: Any,
    ) -> None:
        check_one_step(steps)
        super().__init__(
            model, eps, steps=1, alpha=1.25 * eps if alpha is None else alpha, **options
        )
