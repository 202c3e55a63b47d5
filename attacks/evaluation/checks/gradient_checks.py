"""Checks of a model's gradients: whether they are those of the model, vanish, or reach the routers.

``model_checks`` runs them, beside its checks of the model's answers.
"""

import torch
from torch import Tensor, nn

from ironmoe.attacks.balls.elements import Bounds, Box, box_at
from ironmoe.attacks.engine.attacked_model import AttackedModel, Model
from ironmoe.attacks.evaluation.report import Flag
from ironmoe.attacks.losses import cross_entropy, margin
from ironmoe.attacks.random import example_keys, uniform
from ironmoe.moe import trace_routing
from ironmoe.moe.routing.routed_layers import routing_sites

# Fewer images do not tell a rounded input from chance.
FEW = 8
# This noise, as a share of the pixel range, is too small for an input that is rounded to 8 bits.
FINER_THAN_8_BIT = 1 / 1024
# A gradient of the margin with respect to router logits, divided by the margin: less is rounding.
GRADIENT_ROUNDING = 1e-6


def quantised(
    bounds: Bounds, attacked_model: AttackedModel, images: Tensor, labels: Tensor, random: float
) -> Flag:
    """Whether tiny noise changes the margin as the gradient says it should."""
    name = "quantised input"
    if random or images.element_size() < 4 or _in_half_precision(attacked_model.model):
        return Flag(name, False, 0.0, "Not looked at: the model is random, or of half precision.")

    box = box_at(images, bounds)
    noise = _tiny_noise(images, box)
    moved = (images + noise).clamp(*box)
    here = _margin_and_gradient(attacked_model, images, labels)
    there = _margin_and_gradient(attacked_model, moved, labels)

    expected = (here[1] * (moved - images)).flatten(1).sum(1).double()
    actual = (there[0] - here[0]).double()
    counted = expected != 0
    if not bool(counted.any()):
        margins = (here[0], there[0])
        return _steps(attacked_model, images, labels, noise=noise, margins=margins, box=box)
    if int(counted.sum()) < FEW:
        return Flag(name, False, 0.0, f"Not looked at: fewer than {FEW} images have a gradient.")

    difference = (actual - expected).abs()
    size = actual.abs() + expected.abs()
    value = float((difference / size)[counted].median())  # above 0 where it counts
    tripped = value > 0.5
    return Flag(
        name,
        tripped,
        value,
        "Noise of 1/1024 of the pixel range changes the margin otherwise than the gradient says: "
        f"by {100 * value:.0f} % of the change. "
        + (
            "The model rounds its input, or its gradients are not its own."
            if tripped
            else "Gradients describe the model."
        ),
    )


def _in_half_precision(model: Model) -> bool:
    """Whether the model's weights have 16 bits or fewer."""
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return weight is not None and weight.element_size() < 4


def _tiny_noise(images: Tensor, box: Box) -> Tensor:
    """Uniform noise, the same in each call."""
    low, high = box
    keys = example_keys(0, torch.arange(len(images), device=images.device), 0)
    noise = 2 * uniform(keys, tuple(images.shape[1:]), images.dtype) - 1
    return noise * FINER_THAN_8_BIT * (high - low)


def zero_gradients(
    attacked_model: AttackedModel, images: Tensor, labels: Tensor, logits: Tensor
) -> Flag:
    """Whether the cross-entropy of correctly classified images has a gradient at all."""
    right = logits.argmax(1) == labels
    attempts = {"point": images, "label": labels} | attacked_model.record(images)
    try:
        grad = attacked_model.ask(attempts, lambda out, _: cross_entropy(out, labels)).grad
    except ValueError:  # no graph at all
        grad = None

    grad = torch.zeros_like(images) if grad is None else grad
    zero = ((grad.flatten(1) == 0).all(1) | ~grad.flatten(1).isfinite().all(1)) & right
    share = float(zero.sum()) / max(int(right.sum()), 1)

    return Flag(
        "zero gradients",
        share > 0,
        share,
        f"{100 * share:.0f} % of the correctly classified images have a cross-entropy gradient of "
        "exactly 0. "
        + (
            "Attacks on the cross-entropy stand still there: use the margin or DLR, and Square."
            if share
            else "None stands still."
        ),
    )


def routing_gradient(attacked_model: AttackedModel, images: Tensor, labels: Tensor) -> Flag:
    """Whether the margin has a gradient with respect to the logits of every router."""
    name = "routing gradient blocked"
    if not isinstance(attacked_model.model, nn.Module) or not routing_sites(attacked_model.model):
        return Flag(name, False, 0.0, "The model has no routing that is known here.")

    points = images.detach().requires_grad_()
    with torch.enable_grad(), trace_routing(attacked_model.model, keep_graph=True) as trace:
        # The gradient of the margin does not vanish where the model is sure.
        margins = margin(attacked_model.logits(points), labels)
        loss = margins.sum()
        least = GRADIENT_ROUNDING * float(margins.detach().abs().max())

    layers = {
        layer: [logits for logits in seen.all_logits if logits is not None]
        for layer, seen in trace.layers.items()
    }
    blocked = [layer for layer, seen in layers.items() if seen and not _reaches(loss, seen, least)]

    share = len(blocked) / max(len(layers), 1)
    return Flag(
        name,
        bool(blocked),
        share,
        f"No gradient reaches the routers of {', '.join(blocked)}: an attack cannot see how to "
        "reroute tokens. Use routing=StraightThrough()."
        if blocked
        else "Gradients reach every router.",
    )


def _reaches(loss: Tensor, logits: list[Tensor], least: float) -> bool:
    """Whether a gradient of the loss with respect to these router logits has an entry above
    ``least``. A gate that is always 1, the one choice of K = 1 renormalised, leaves no more than
    rounding errors of a gradient."""
    wanted = [value for value in logits if value.requires_grad]
    if not wanted or not loss.requires_grad:
        return False
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    return any(grad is not None and float(grad.abs().max()) > least for grad in grads)


def _steps(
    attacked_model: AttackedModel,
    images: Tensor,
    labels: Tensor,
    *,
    noise: Tensor,
    margins: tuple[Tensor, Tensor],
    box: Box,
) -> Flag:
    """No image has a gradient: does the margin stand still under tiny noise and move under noise
    that is 64 times larger? ``margins`` are those without and with the tiny noise."""
    here, there = margins

    # 1/16 of the pixel range is more than the distance of two values of a rounded input.
    with torch.no_grad():
        far = margin(attacked_model.predict((images + 64 * noise).clamp(*box)), labels)
    still = float((there == here).double().mean())
    moves = float((far != here).double().mean())
    tripped = still > 0.5 and moves > 0.5

    return Flag(
        "quantised input",
        tripped,
        still,
        "No image has a gradient, and noise of 1/1024 of the pixel range leaves the margin of "
        f"{100 * still:.0f} % of them as it was, to the bit. "
        + (
            "The model rounds its input."
            if tripped
            else "It does not look like rounding: see zero gradients."
        ),
    )


def _margin_and_gradient(
    attacked_model: AttackedModel, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """(B,) and (B, …); zeros where the model has no graph at all."""
    try:
        answer = attacked_model.ask(
            {"point": images, "label": labels} | attacked_model.record(images),
            lambda logits, _: margin(logits, labels),
        )
    except ValueError:
        return torch.zeros(len(images), device=images.device), torch.zeros_like(images)
    assert answer.grad is not None
    return answer.loss, answer.grad.nan_to_num()
