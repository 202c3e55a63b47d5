"""Checks against false security: signs in a model that it looks more robust than it is.
(``outcome_checks``: in what attacks did.)

After AutoAttack's flags (Croce & Hein, arXiv 2003.01690), Carlini et al. (arXiv 1902.06705) and
Pintor et al. (arXiv 2106.09947); batch dependence, non-determinism and blocked routing gradients
are added for models with experts.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.balls.ball import Bounds
from ironmoe.attacks.engine.attacked_model import AttackedModel, check_labels
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.losses import cross_entropy, margin
from ironmoe.attacks.random import example_keys, uniform
from ironmoe.moe import trace_routing
from ironmoe.moe.routing.routed_layers import routing_sites

IMAGES = 64  # that the model is looked at with
ALONE = 4  # of them one by one
FEW = 8  # images: fewer do not tell a rounded input from chance
DIFFERS = 1e-4  # distance of logits divided by their norm: more is no rounding
FINER_THAN_8_BIT = 1 / 1024  # of the pixel range
ROUNDING = 1e-6  # of a gradient of the margin with respect to router logits, relative to the margin


class Flag(NamedTuple):
    """What one check says: its name, whether it tripped, the number behind it, and what that means
    in plain words."""

    name: str
    tripped: bool
    value: float
    message: str


def check_model(
    attack: Attack, images: Tensor, labels: Tensor, *, also: Sequence[Attack] = ()
) -> list[Flag]:
    """Look at the model of an attack, on up to 64 images in ``bounds``. Costs about a dozen passes.

    ``also``: other attacks that are to be made on it.

    Raises:
        ValueError: labels beyond the model's classes; NaN logits.
    """
    attacked_model, images, labels = (
        attack.attacked_model,
        images[:IMAGES].detach(),
        labels[:IMAGES],
    )
    attacked_model.image_dtype = images.dtype
    plain = copy.copy(attacked_model)
    plain.attack_dtype = None  # the model is looked at, not the precision of the search
    try:
        with borrowed(attacked_model.model):
            logits = [plain.predict(images) for _ in range(3)]
            check_labels(labels, logits[0])
            random = max(float(_apart(logits[0], other).max()) for other in logits[1:])
            return [
                _randomised(random),
                _undetermined(random, logits),
                _softmax(logits[0]),
                _classes([attack, *also], logits[0].shape[1]),
                _quantised(attack.bounds, plain, images, labels, random),
                _batch_dependence(plain, images, logits[0], random),
                _zero_gradients(plain, images, labels, logits[0]),
                _routing_gradient(plain, images, labels),
            ]
    finally:
        attacked_model.forwards, attacked_model.backwards = plain.forwards, plain.backwards


def passes_of_checks(images: int) -> int:
    """Forward passes of single images that ``check_model`` makes at most, on so many images."""
    images = min(images, IMAGES)
    return 12 * images + ALONE


def no_room_for_checks() -> Flag:
    """In place of ``check_model``."""
    return Flag(
        "model not looked at",
        True,
        0.0,
        "max_forwards left no room for a look at the model for signs of false security.",
    )


def _randomised(random: float) -> Flag:
    tripped = random > DIFFERS
    return Flag(
        "randomised model",
        tripped,
        random,
        f"Two passes over the same images differ by {random:.1e} of the logits. "
        + (
            "Attacks need the mean of several gradients: use eot, or AutoAttack's version 'rand'."
            if tripped
            else "No randomness."
        ),
    )


def _undetermined(random: float, logits: list[Tensor]) -> Flag:
    differ = not all(torch.equal(logits[0], other) for other in logits[1:])
    tripped = differ and random <= DIFFERS
    return Flag(
        "forward non-determinism",
        tripped,
        random if differ else 0.0,
        "The same pass gives other bits each time, within rounding: images near a boundary may "
        "change their verdict."
        if tripped
        else ("See randomised model." if differ else "The same pass gives the same bits."),
    )


def _softmax(logits: Tensor) -> Flag:
    sums = (logits.double().sum(1) - 1).abs().max()
    # bfloat16 sums are that far off
    tripped = bool(logits.min() >= 0) and bool(logits.max() <= 1) and float(sums) < 1e-2
    return Flag(
        "softmax outputs",
        tripped,
        float(sums),
        "The outputs are probabilities, whose gradients vanish where the model is sure: attack "
        "the logits before the softmax."
        if tripped
        else "The outputs are no probabilities.",
    )


def _classes(attacks: list[Attack], classes: int) -> Flag:
    needed = max(stage.classes_needed for attack in attacks for stage in attack.stages)
    tripped = classes < needed
    return Flag(
        "fewer classes than the loss needs",
        tripped,
        float(classes),
        f"The model has {classes} classes, and a loss or its targets ask for {needed}: fewer "
        "targets are gone through, and APGD takes the "
        "margin in place of DLR."
        if tripped
        else f"{classes} classes are enough.",
    )


def _quantised(
    bounds: Bounds, attacked_model: AttackedModel, images: Tensor, labels: Tensor, random: float
) -> Flag:
    """Whether tiny noise changes the margin as the gradient says it should."""
    name = "quantised input"
    weight = (
        next(attacked_model.model.parameters(), None)
        if isinstance(attacked_model.model, nn.Module)
        else None
    )
    if random or images.element_size() < 4 or (weight is not None and weight.element_size() < 4):
        return Flag(name, False, 0.0, "Not looked at: the model is random, or of half precision.")
    low, high = bounds
    keys = example_keys(0, torch.arange(len(images), device=images.device), 0)
    noise = (
        (2 * uniform(keys, tuple(images.shape[1:]), images.dtype) - 1)
        * FINER_THAN_8_BIT
        * (high - low)
    )
    moved = (images + noise).clamp(low, high)
    here = _margin_and_gradient(attacked_model, images, labels)
    there = _margin_and_gradient(attacked_model, moved, labels)
    expected = (here[1] * (moved - images)).flatten(1).sum(1).double()
    actual = (there[0] - here[0]).double()
    counted = expected != 0
    if not bool(counted.any()):
        return _steps(attacked_model, images, labels, noise, here[0], there[0], bounds)
    if int(counted.sum()) < FEW:
        return Flag(name, False, 0.0, f"Not looked at: fewer than {FEW} images have a gradient.")
    value = float(
        ((actual - expected).abs() / (actual.abs() + expected.abs()).clamp_min(1e-300))[
            counted
        ].median()
    )
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


def _steps(
    attacked_model: AttackedModel,
    images: Tensor,
    labels: Tensor,
    noise: Tensor,
    here: Tensor,
    there: Tensor,
    bounds: Bounds,
) -> Flag:
    """No image has a gradient: does the margin stand still under tiny noise and move under noise
    that is 64 times larger?"""
    with torch.no_grad():
        far = margin(attacked_model.predict((images + 64 * noise).clamp(*bounds)), labels)
    still, moves = float((there == here).double().mean()), float((far != here).double().mean())
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
    try:
        answer = attacked_model.ask(
            {"point": images, "label": labels} | attacked_model.record(images),
            lambda logits, _: margin(logits, labels),
        )
    except ValueError:  # no graph at all
        return torch.zeros(len(images), device=images.device), torch.zeros_like(images)
    assert answer.grad is not None
    return answer.loss, answer.grad.nan_to_num()


def _batch_dependence(
    attacked_model: AttackedModel, images: Tensor, logits: Tensor, random: float
) -> Flag:
    if len(images) < 2:
        return Flag("batch dependence", False, 0.0, "Not looked at: one image has no company.")
    order = torch.arange(len(images) - 1, -1, -1, device=images.device)
    apart = [_apart(attacked_model.predict(images[order])[order.argsort()], logits)]
    apart += [
        _apart(attacked_model.predict(images[i : i + 1]), logits[i : i + 1])
        for i in range(min(ALONE, len(images)))
    ]
    worst = max((float(a.max()) for a in apart), default=0.0)
    tripped = worst > max(DIFFERS, 3 * random)
    return Flag(
        "batch dependence",
        tripped,
        worst,
        f"An image's logits change by up to {worst:.1e} of their size with the images beside it. "
        + (
            "A verdict holds for these batches only; groups of a known capacity are attacked as a "
            "whole, anything else is not."
            if tripped
            else "Images do not influence each other."
        ),
    )


def _zero_gradients(
    attacked_model: AttackedModel, images: Tensor, labels: Tensor, logits: Tensor
) -> Flag:
    right = logits.argmax(1) == labels
    rows = {"point": images, "label": labels} | attacked_model.record(images)
    try:
        grad = attacked_model.ask(rows, lambda out, _: cross_entropy(out, labels)).grad
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


def _routing_gradient(attacked_model: AttackedModel, images: Tensor, labels: Tensor) -> Flag:
    name = "routing gradient blocked"
    if not isinstance(attacked_model.model, nn.Module) or not routing_sites(attacked_model.model):
        return Flag(name, False, 0.0, "The model has no routing that is known here.")
    points = images.detach().requires_grad_()
    with torch.enable_grad(), trace_routing(attacked_model.model, keep_graph=True) as trace:
        # its gradient does not vanish where the model is sure
        margins = margin(attacked_model.logits(points), labels)
        loss, least = margins.sum(), ROUNDING * float(margins.detach().abs().max())
    layers = {
        layer: [logits for logits in seen.all_logits if logits is not None]
        for layer, seen in trace.layers.items()
    }
    blocked = []
    for layer, seen in layers.items():
        wanted = [logits for logits in seen if logits.requires_grad]
        grads = (
            torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
            if wanted and loss.requires_grad
            else ()
        )
        # A gate that is always 1, the one choice of K = 1 renormalised, leaves rounding errors of a
        # gradient.
        if seen and not any(grad is not None and float(grad.abs().max()) > least for grad in grads):
            blocked.append(layer)
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


def _apart(logits: Tensor, other: Tensor) -> Tensor:
    """(B,) distance of two answers, in units of the first's norm."""
    one, two = logits.double(), other.double()
    return (one - two).norm(dim=1) / one.norm(dim=1).clamp_min(1e-12)
