"""The check whether a model rounds its input, or gives gradients that are not its own."""

import torch
from torch import Tensor, nn

from ironmoe.attacks.balls.elements import Box
from ironmoe.attacks.evaluation.checks.sample import Sample, no_gradient
from ironmoe.attacks.evaluation.report import Flag
from ironmoe.attacks.model_errors import NoGradient
from ironmoe.attacks.random import example_keys, uniform

NAME = "quantised input"
# Fewer images do not tell a rounded input from chance.
FEW = 8
# Noise of these sizes, as shares of the range that a pixel has among the images. The first is too
# small for an input that is rounded to 8 bits. Where a smooth model bends over that much, the
# gradient holds for one of the smaller ones; where the input is rounded, it holds for none.
SIZES = (2.0**-10, 2.0**-14, 2.0**-18)
# Noise of this size is more than the distance of two values of a rounded input.
COARSE = 2.0**-4
# The margin changes by so many units of its rounding, or the change says nothing.
RESOLVED = 128


def quantised(sample: Sample, outputs: Tensor, *, box: Box, random: float) -> Flag:
    """Whether small noise changes the margin as the gradient says it should.

    outputs: of the images; random: by how much two answers to the same images differ.
    """
    narrow = min(outputs.element_size(), sample.images.element_size()) < 4
    if random or narrow or _in_half_precision(sample.model.model):
        return Flag(NAME, False, 0.0, "Not looked at: the model is random, or of half precision.")

    noise = _noise(sample.images)
    try:
        here, grad = sample.ask(sample.height)
    except NoGradient as error:
        return no_gradient(NAME, error)

    grad = grad.nan_to_num()
    if not bool(grad.any()):
        return _steps(sample, here, noise=noise, box=box)

    flat = outputs.unsqueeze(-1).flatten(1)
    highest = flat.topk(min(2, flat.shape[1]), dim=1).values.abs().amax(1)
    least = RESOLVED * torch.finfo(outputs.dtype).eps * highest.double()

    differences = []
    for size in SIZES:
        moved = (sample.images + size * noise).clamp(*box)
        expected = (grad * (moved - sample.images)).flatten(1).sum(1).double()
        resolved = expected.abs() > least
        if int(resolved.sum()) < FEW:
            break

        actual = (sample.heights(moved) - here).double()
        difference = (actual - expected).abs() / (actual.abs() + expected.abs())
        differences.append(float(difference[resolved].median()))
        if differences[-1] <= 0.5:
            break
    return _verdict(differences)


def _verdict(differences: list[float]) -> Flag:
    """differences: between the change of the margin and what the gradient says, as shares, for each
    size of noise that was tried."""
    if not differences:
        return Flag(
            NAME,
            False,
            0.0,
            f"Not looked at: fewer than {FEW} images have a gradient that shows beyond rounding.",
        )

    value = min(differences)
    tripped = value > 0.5
    return Flag(
        NAME,
        tripped,
        value,
        "Noise of 1/1024 of a pixel's range, or less, changes the margin otherwise than the "
        f"gradient says: by {100 * value:.0f} % of the change. "
        + (
            "The model rounds its input, or its gradients are not its own."
            if tripped
            else "Gradients describe the model."
        ),
    )


def _in_half_precision(model: object) -> bool:
    """Whether the model's weights have 16 bits or fewer."""
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return weight is not None and weight.element_size() < 4


def _noise(images: Tensor) -> Tensor:
    """Uniform noise of the range that each pixel has among the images, the same in each call."""
    keys = example_keys(0, torch.arange(len(images), device=images.device), 0)
    noise = 2 * uniform(keys, tuple(images.shape[1:]), images.dtype) - 1
    return noise * (images.amax(0) - images.amin(0))


def _steps(sample: Sample, here: Tensor, *, noise: Tensor, box: Box) -> Flag:
    """No image has a gradient: does the margin ``here`` (B,) stand still under tiny noise and move
    under noise that is 64 times larger?"""
    near, far = (
        sample.heights((sample.images + size * noise).clamp(*box)) for size in (SIZES[0], COARSE)
    )
    still = float((near == here).double().mean())
    moves = float((far != here).double().mean())
    tripped = still > 0.5 and moves > 0.5

    return Flag(
        NAME,
        tripped,
        still,
        "No image has a gradient, and noise of 1/1024 of a pixel's range leaves the margin of "
        f"{100 * still:.0f} % of them as it was, to the bit. "
        + (
            "The model rounds its input."
            if tripped
            else "It does not look like rounding: see zero gradients."
        ),
    )
