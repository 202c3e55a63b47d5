"""The inner attacks as plain functions: images in, images to train on out.

Each takes a model, or an ``Inner`` with its settings, and the settings of ``Inner`` as keywords.
All images are perturbed, weights get no gradient, and the model comes back as it was. Images are
(B, …) in any float dtype inside ``bounds``; what is returned is float32, or float64 for float64
images, and has no graph.

Each raises TypeError or ValueError for a radius or a step length that is not finite and above 0
(those in tensors are not read), for fewer than one step, and for images, labels or a model that
cannot be attacked.
"""

from typing import Any

from torch import Tensor, nn

from ironmoe.attacks.losses import Loss, cross_entropy, get_loss
from ironmoe.attacks.routing.auxiliary_loss import AuxiliaryLoss
from ironmoe.attacks.training.checks import (
    check_count,
    check_factor,
    check_labels,
    check_logits,
    check_strength,
    check_tensors,
)
from ironmoe.attacks.training.inner.loop import Inner, Objective, default_alpha, start_point

Model = nn.Module | Inner


def inner_of(model: Model, settings: dict[str, Any]) -> Inner:
    """The model with its settings. ValueError: settings for a model that has its own."""
    if not isinstance(model, Inner):
        return Inner(model, **settings)
    if settings:
        raise ValueError(f"settings must belong to the Inner, got {', '.join(settings)}")
    return model


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    steps: int = 10,
    alpha: float | Tensor | None = None,
    loss: str | Loss = "ce",
    start: str | Tensor = "uniform",
    **settings: Any,
) -> Tensor:
    """Projected gradient ascent on the loss (Madry et al., arXiv 1706.06083).

    Args:
        labels: (B,) int64 classes, (B, C) probabilities, or whatever ``loss`` takes.
        eps, alpha: radius and step length, in the units of the images; ``alpha=None``:
            ``default_alpha``. A tensor () serves where a CUDA graph replays the attack.
        loss: "ce", another name of ``ironmoe.attacks.losses``, or (logits, labels) → (B,).
        start: as in ``Inner.ascend``.
        settings: ``norm``, ``bounds``, ``mode``, ``routing`` and the others of ``Inner``.
    """
    return inner_of(model, settings).ascend(
        images,
        labels,
        _objective(loss),
        eps=eps,
        alpha=_step_length(alpha, eps, steps),
        steps=steps,
        start=start,
    )


def kl_pgd(
    model: Model,
    images: Tensor,
    *,
    eps: float | Tensor,
    steps: int = 10,
    alpha: float | Tensor | None = None,
    start: str | Tensor = "normal",
    **settings: Any,
) -> Tensor:
    """The attack of TRADES (Zhang et al., arXiv 1901.08573): ascent on KL(p(x) ‖ p(x′)), for which
    no label is needed. The gradient is 0 at x′ = x, so it begins beside the image.

    Arguments as in ``pgd``.
    """
    check_tensors(images, images)
    inner = inner_of(model, settings)
    with inner.running(images):
        clean_logits = inner.logits(images.detach())
    check_logits(clean_logits)

    def divergence(logits: Tensor, _: Tensor) -> Tensor:
        return kl_divergence(clean_logits, logits)

    return inner.ascend(
        images,
        clean_logits.argmax(1),
        divergence,
        eps=eps,
        alpha=_step_length(alpha, eps, steps),
        steps=steps,
        start=start,
    )


def fgsm_rs(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    alpha: float | Tensor | None = None,
    loss: str | Loss = "ce",
    **settings: Any,
) -> Tensor:
    """FGSM from a random start (Wong et al., arXiv 2001.03994): one step of ``alpha``, by default
    1.25 · eps, from a point drawn uniformly; the result is projected back.

    Arguments as in ``pgd``.
    """
    check_strength(eps=eps)
    return pgd(
        model,
        images,
        labels,
        eps=eps,
        steps=1,
        alpha=1.25 * eps if alpha is None else alpha,
        loss=loss,
        **settings,
    )


def n_fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    alpha: float | Tensor | None = None,
    noise: float = 2.0,
    loss: str | Loss = "ce",
    **settings: Any,
) -> Tensor:
    """N-FGSM (de Jorge et al., arXiv 2202.01181): noise from the ball of radius ``noise`` · eps,
    then a step of ``alpha``, by default eps, from there. Nothing is projected onto a ball, so x′
    may be (noise + 1) · eps away; only the box holds.

    Other arguments as in ``pgd``.
    """
    alpha = _step_length(eps if alpha is None else alpha, eps, steps=1)
    check_factor(noise=noise)
    inner = inner_of(model, settings)
    noisy = start_point(inner.around(images, noise * eps), "uniform")
    return inner.ascend(
        images,
        labels,
        _objective(loss),
        eps=float("inf"),
        alpha=alpha,
        steps=1,
        start=noisy,
    )


def vmoe_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    steps: int,
    auxiliary_loss: bool = False,
    loss: str | Loss = "ce",
    **settings: Any,
) -> Tensor:
    """The inner attack of the V-MoE robustness paper (arXiv 2210.10253, its official trainer).

    It makes steps of eps / steps from the image itself and clips nothing. The model stays in the
    mode in which it trains, so that each step meets fresh router noise.

    Args (others as in ``pgd``):
        auxiliary_loss: raise the routers' auxiliary losses, too.
    """
    check_strength(eps=eps)
    check_count(steps=steps)
    settings = vmoe_settings(auxiliary_loss) | settings
    return pgd(
        model,
        images,
        labels,
        eps=eps,
        steps=steps,
        alpha=eps / steps,
        loss=loss,
        start="clean",
        **settings,
    )


def vmoe_settings(auxiliary_loss: bool) -> dict[str, Any]:
    """The settings of ``Inner`` in the official trainer of V-MoE."""
    return {
        "bounds": None,
        "mode": "train",
        "routing": AuxiliaryLoss() if auxiliary_loss else None,
    }


def kl_divergence(clean_logits: Tensor, logits: Tensor) -> Tensor:
    """(B,) KL(softmax(clean_logits) ‖ softmax(logits)). A class that the clean logits rule out by
    −∞ adds 0."""
    log_p = clean_logits.log_softmax(-1)
    log_q = logits.log_softmax(-1)
    ruled_out = log_p.isneginf()
    difference = log_p.masked_fill(ruled_out, 0) - log_q.masked_fill(ruled_out, 0)
    return (log_p.exp() * difference).sum(-1)


def _objective(loss: str | Loss) -> Objective:
    """What the images raise; the cross-entropy checks its labels first."""
    raised = get_loss(loss)
    if raised is not cross_entropy:
        return raised

    def checked(logits: Tensor, labels: Tensor) -> Tensor:
        check_labels(logits, labels)
        return cross_entropy(logits, labels)

    return checked


def _step_length(alpha: float | Tensor | None, eps: float | Tensor, steps: int) -> float | Tensor:
    """``alpha``, or its default. TypeError, ValueError: a number that is none of these."""
    check_count(steps=steps)
    check_strength(eps=eps)
    if alpha is None:
        return eps * default_alpha(1.0, steps)
    check_strength(alpha=alpha)
    return alpha
