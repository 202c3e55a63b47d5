"""Checks against false security: signs in a model that it looks more robust than it is.
(``outcome_checks``: in what attacks did.)

After AutoAttack's flags (Croce & Hein, arXiv 2003.01690), Carlini et al. (arXiv 1902.06705) and
Pintor et al. (arXiv 2106.09947); batch dependence, non-determinism and blocked routing gradients
are added for models with experts.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.judging.finite import not_finite
from ironmoe.attacks.evaluation.checks.distances import DIFFERS, apart
from ironmoe.attacks.evaluation.checks.gradient_checks import (
    ROUTING,
    ZERO,
    routing_gradient,
    zero_gradients,
)
from ironmoe.attacks.evaluation.checks.rounding_check import NAME as QUANTISED
from ironmoe.attacks.evaluation.checks.rounding_check import quantised
from ironmoe.attacks.evaluation.checks.sample import Sample
from ironmoe.attacks.evaluation.findings.flag import Flag
from ironmoe.attacks.extra import Extra, extra_columns

RANDOMISED = "randomised model"
GRADIENT_CHECKS = (QUANTISED, ZERO, ROUTING)
UNDETERMINED = "forward non-determinism"
SOFTMAX = "softmax outputs"
CLASSES = "fewer classes than the loss needs"
BATCH = "batch dependence"
MODEL_CHECKS = (RANDOMISED, UNDETERMINED, SOFTMAX, CLASSES, *GRADIENT_CHECKS, BATCH)
# The checks look at so many images at most, and at so many of them one by one.
IMAGES = 64
ALONE = 4
# Outputs between 0 and 1 are probabilities if more than this share of them is so near to 0 or 1.
SURE_SHARE = 0.1
SURE = 0.01
# One image is asked about as often as there are images, and at least so often: a model that seldom
# draws shows itself in many passes alone.
AGAIN_AT_LEAST = 32


def check_model(
    attack: Attack,
    images: Tensor,
    labels: Tensor,
    *,
    also: Sequence[Attack] = (),
    extra: Extra | None = None,
) -> list[Flag]:
    """Look at the model of an attack, on up to 64 images in ``bounds``. This costs about a dozen
    passes of each image.

    Args:
        attack: the checks run its model, in full precision.
        images, labels: (N, …) and (N,) int64; for another goal than a class what it takes, (N, …).
        also: other attacks on the same model, whose losses may need more classes.
        extra: further inputs of the model, as in ``Attack.run``.

    Raises:
        ValueError: labels beyond the model's classes; NaN logits.
        TypeError: no attack, but perhaps its model.
    """
    if not isinstance(attack, Attack):
        raise TypeError(
            "attack must be an attack on the model, such as PGD(model), got "
            f"{type(attack).__name__}"
        )
    columns = {"label": labels, **extra_columns(extra, len(images))}
    return look_at(attack, images, columns, also=also)


def look_at(
    attack: Attack,
    images: Tensor,
    columns: Mapping[str, Tensor],
    *,
    also: Sequence[Attack] = (),
    numbers: Tensor | None = None,
) -> list[Flag]:
    """``check_model`` with everything that belongs to the images as columns (N, …) by name.

    numbers: (N,) of the images in the data, for errors; None: 0 … N − 1.
    """
    attacked_model = attack.attacked_model
    images = images[:IMAGES].detach()
    columns = {name: column[:IMAGES] for name, column in columns.items()}
    attacked_model.image_dtype = images.dtype

    # The checks are about the model and not about the precision of the search.
    plain = copy.copy(attacked_model)
    plain.attack_dtype = None
    try:
        with borrowed(attacked_model.model):
            sample = Sample(plain, attack.goal, images, columns)
            outputs = sample.model.judge(images, columns)
            bad = attack.goal.bad(outputs)
            if bool(bad.any()):
                known = torch.arange(len(images)) if numbers is None else numbers[:IMAGES]
                found = known.to(bad.device)[bad].tolist()
                raise not_finite(found, len(images), "without any attack")

            attack.goal.check(outputs, sample.labels)
            random, is_exact = _randomness(sample, outputs)
            return [
                _randomised(random),
                _undetermined(random, is_exact),
                *_of_classes([attack, *also], outputs),
                *_of_gradients(sample, outputs, attack.bounds, random),
                _batch_dependence(sample, outputs, random),
            ]
    finally:
        attacked_model.forwards = plain.forwards
        attacked_model.backwards = plain.backwards


def passes_of_checks(images: int) -> int:
    """How many forward passes of single images ``check_model`` makes at most, on so many images."""
    images = min(images, IMAGES)
    return 11 * images + max(images, AGAIN_AT_LEAST) + ALONE


def says_random(flags: Sequence[Flag]) -> bool:
    """Whether the look at the model found it random."""
    return any(flag.name == RANDOMISED and flag.tripped for flag in flags)


def says_steady(flags: Sequence[Flag]) -> bool:
    """Whether the look at the model found that it always gives the same answer."""
    return any(f.name == RANDOMISED and f.looked_at and not f.tripped for f in flags)


def none_made(why: str) -> list[Flag]:
    """The flags of ``check_model`` where it could not look at the model."""
    return [Flag.not_looked_at(name, why) for name in MODEL_CHECKS]


def _randomness(sample: Sample, outputs: Tensor) -> tuple[float, bool]:
    """(how far two answers to the same images lie apart, all bits are the same).

    All images are asked about twice, and one image as often as there are images, or more often: a
    model that seldom draws, and then for a whole batch, shows itself in many passes alone.
    """
    again = sample.predict()
    one = sample.part(slice(0, 1))
    first, *others = [one.predict() for _ in range(max(len(sample.images), AGAIN_AT_LEAST))]
    pairs = [(outputs, again), *((first, other) for other in others)]
    random = max(float(apart(mine, other).max()) for mine, other in pairs)
    return random, all(torch.equal(mine, other) for mine, other in pairs)


def _randomised(random: float) -> Flag:
    tripped = random > DIFFERS
    return Flag(
        RANDOMISED,
        tripped,
        random,
        f"Two passes over the same images differ by {random:.1e} of the logits. "
        + (
            "A single pass decides nothing: verdicts need many. Attacks need the mean of several "
            "gradients: use eot, or AutoAttack's version 'rand'."
            if tripped
            else "No randomness."
        ),
    )


def _undetermined(random: float, is_exact: bool) -> Flag:
    if random > DIFFERS:
        return Flag.not_looked_at(UNDETERMINED, "the model is random, see there")
    return Flag(
        UNDETERMINED,
        not is_exact,
        0.0 if is_exact else random,
        "The same pass gives the same bits."
        if is_exact
        else "The same pass gives other bits each time, within rounding: images near a boundary "
        "may change their verdict.",
    )


def _of_classes(attacks: list[Attack], outputs: Tensor) -> list[Flag]:
    """What there is to say of logits, and of nothing else."""
    if outputs.ndim != 2 or not attacks[0].goal.has_classes:
        why = "the outputs are no logits of classes"
        return [Flag.not_looked_at(name, why) for name in (SOFTMAX, CLASSES)]
    return [_softmax(outputs), _classes(attacks, outputs.shape[1])]


def _of_gradients(sample: Sample, outputs: Tensor, bounds: Bounds, random: float) -> list[Flag]:
    """What there is to say of gradients, if the outputs are numbers that may have one, and a
    classifier's are more than one."""
    one_class = sample.goal.has_classes and outputs.shape[-1] < 2
    if one_class or not outputs.is_floating_point():
        why = "the model has one class" if one_class else "the outputs are whole numbers"
        return [Flag.not_looked_at(name, why) for name in GRADIENT_CHECKS]
    sample = sample.with_recorded_routing()
    return [
        quantised(sample, outputs, bounds=bounds, random=random),
        zero_gradients(sample, outputs, bounds),
        routing_gradient(sample),
    ]


def _softmax(logits: Tensor) -> Flag:
    sums = (logits.double().sum(1) - 1).abs().max()
    within = bool(logits.min() >= 0) and bool(logits.max() <= 1)
    # The sums of bfloat16 probabilities are that far off. Sigmoids do not sum up to 1, but a model
    # that has learned something is nearly sure of many classes.
    sure = ((logits < SURE) | (logits > 1 - SURE)).double().mean()
    tripped = within and (float(sums) < 1e-2 or float(sure) > SURE_SHARE)
    return Flag(
        SOFTMAX,
        tripped,
        float(sums),
        "The outputs are probabilities, whose gradients vanish where the model is sure: attack "
        "the logits before the softmax or sigmoid."
        if tripped
        else "The outputs are no probabilities.",
    )


def _classes(attacks: list[Attack], classes: int) -> Flag:
    needed = max(stage.classes_needed for attack in attacks for stage in attack.stages)
    tripped = classes < needed
    return Flag(
        CLASSES,
        tripped,
        float(classes),
        f"The model has {classes} classes, and a loss or its targets ask for {needed}: fewer "
        "targets are gone through, and where DLR needs more classes APGD takes the margin in place "
        "of it."
        if tripped
        else f"{classes} classes are enough.",
    )


def _batch_dependence(sample: Sample, outputs: Tensor, random: float) -> Flag:
    count = len(outputs)
    if count < 2:
        return Flag.not_looked_at(BATCH, "one image has no company")

    # The images in the opposite order, and some of them alone.
    order = torch.arange(count - 1, -1, -1, device=outputs.device)
    distances = [apart(outputs, sample.part(order).predict()[order.argsort()])]
    distances += [
        apart(outputs[one : one + 1], sample.part(slice(one, one + 1)).predict())
        for one in range(min(ALONE, count))
    ]
    worst = max(float(distance.max()) for distance in distances)

    tripped = worst > max(DIFFERS, 3 * random)
    return Flag(
        BATCH,
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
