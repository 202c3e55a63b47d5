"""Checks against false security: signs in a model that it looks more robust than it is.
(``outcome_checks``: in what attacks did.)

After AutoAttack's flags (Croce & Hein, arXiv 2003.01690), Carlini et al. (arXiv 1902.06705) and
Pintor et al. (arXiv 2106.09947); batch dependence, non-determinism and blocked routing gradients
are added for models with experts.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.engine.attacked_model import AttackedModel
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.evaluation.checks.distances import DIFFERS, apart
from ironmoe.attacks.evaluation.checks.gradient_checks import (
    quantised,
    routing_gradient,
    zero_gradients,
)
from ironmoe.attacks.evaluation.report import Flag

RANDOMISED = "randomised model"
# The checks look at so many images at most, and at so many of them one by one.
IMAGES = 64
ALONE = 4


def check_model(
    attack: Attack, images: Tensor, labels: Tensor, *, also: Sequence[Attack] = ()
) -> list[Flag]:
    """Look at the model of an attack, on up to 64 images in ``bounds``. This costs about a dozen
    passes of each image.

    Args:
        attack: the checks run its model, in full precision.
        images, labels: (N, …) and (N,) int64.
        also: other attacks on the same model, whose losses may need more classes.

    Raises:
        ValueError: labels beyond the model's classes; NaN logits.
    """
    attacked_model = attack.attacked_model
    images = images[:IMAGES].detach()
    labels = labels[:IMAGES]
    attacked_model.image_dtype = images.dtype

    # The checks are about the model and not about the precision of the search.
    plain = copy.copy(attacked_model)
    plain.attack_dtype = None
    try:
        with borrowed(attacked_model.model):
            logits = [plain.predict(images) for _ in range(3)]
            attack.goal.check(logits[0], labels)
            random = max(float(apart(logits[0], other).max()) for other in logits[1:])
            return [
                _randomised(random),
                _undetermined(random, logits),
                _softmax(logits[0]),
                _classes([attack, *also], logits[0].shape[1]),
                quantised(attack.bounds, plain, images, labels, random),
                _batch_dependence(plain, images, logits[0], random),
                zero_gradients(plain, images, labels, logits[0]),
                routing_gradient(plain, images, labels),
            ]
    finally:
        attacked_model.forwards = plain.forwards
        attacked_model.backwards = plain.backwards


def passes_of_checks(images: int) -> int:
    """How many forward passes of single images ``check_model`` makes at most, on so many images."""
    images = min(images, IMAGES)
    return 12 * images + ALONE


def says_random(flags: Sequence[Flag]) -> bool:
    """Whether the look at the model found it random."""
    return any(flag.name == RANDOMISED and flag.tripped for flag in flags)


def no_room_for_checks() -> Flag:
    """The flag that takes the place of those of ``check_model``, where a budget forbids them."""
    return Flag(
        "model not looked at",
        True,
        0.0,
        "max_forwards left no room for a look at the model for signs of false security.",
    )


def _randomised(random: float) -> Flag:
    tripped = random > DIFFERS
    return Flag(
        RANDOMISED,
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
    # The sums of bfloat16 probabilities are that far off.
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


def _batch_dependence(
    attacked_model: AttackedModel, images: Tensor, logits: Tensor, random: float
) -> Flag:
    if len(images) < 2:
        return Flag("batch dependence", False, 0.0, "Not looked at: one image has no company.")

    # The images in the opposite order, and some of them alone.
    order = torch.arange(len(images) - 1, -1, -1, device=images.device)
    distances = [apart(logits, attacked_model.predict(images[order])[order.argsort()])]
    distances += [
        apart(logits[i : i + 1], attacked_model.predict(images[i : i + 1]))
        for i in range(min(ALONE, len(images)))
    ]
    worst = max(float(distance.max()) for distance in distances)

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
