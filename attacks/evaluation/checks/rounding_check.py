"""The check whether a model rounds its input, or gives gradients that are not its own."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.backends import cudnn

from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.evaluation.checks.sample import FINE, Sample, no_gradient
from ironmoe.attacks.evaluation.report import Flag
from ironmoe.attacks.model_errors import NoGradient

NAME = "quantised input"
# Fewer images do not tell a rounded input from chance.
FEW = 8
# Noise of these sizes, as shares of the range that a pixel has among the images. The first is too
# small for an input that is rounded to 8 bits. Where a smooth model bends over that much, the
# gradient holds for one of the smaller ones; where the input is rounded, it holds for none.
SIZES = (FINE, 2.0**-14, 2.0**-18)
# Noise of this size is more than the distance of two values of a rounded input.
COARSE = 2.0**-2
# The gradient and the differences agree if they differ by at most this share of the change.
AGREES = 0.25
# The margin changes by so many units of its rounding, or the change says nothing.
RESOLVED = 128


def quantised(sample: Sample, outputs: Tensor, *, bounds: Bounds, random: float) -> Flag:
    """Whether small noise changes the margin as the gradient says it should.

    outputs: of the images; random: by how much two answers to the same images differ.
    """
    narrow = min(outputs.element_size(), sample.images.element_size()) < 4
    if random or narrow or _in_half_precision(sample.model.model):
        return Flag.not_looked_at(NAME, "the model is random, or of half precision.")

    with _exact_convolutions(sample.images):
        return _compared(sample, outputs, bounds)


def _compared(sample: Sample, outputs: Tensor, bounds: Bounds) -> Flag:
    """``quantised`` for a model that may be looked at."""
    try:
        here, grad = sample.ask(sample.height)
    except NoGradient as error:
        return no_gradient(NAME, error)

    least = RESOLVED * torch.finfo(outputs.dtype).eps * sample.size(outputs)
    grad = grad.nan_to_num()
    if not bool(grad.any()):
        return _steps(sample, here, bounds=bounds, least=float(least.square().mean().sqrt()))

    differences = []
    for size in SIZES:
        moved = sample.nearby(size, bounds)
        expected = (grad * (moved - sample.images)).flatten(1).sum(1).double()
        resolved = expected.abs() > least
        if int(resolved.sum()) < FEW:
            break

        actual = (sample.heights(moved) - here).double()
        difference = (actual - expected).abs() / (actual.abs() + expected.abs())
        differences.append(float(difference[resolved].median()))
        if differences[-1] <= AGREES:
            break
    return _verdict(differences)


@contextmanager
def _exact_convolutions(images: Tensor) -> Iterator[None]:
    """On a GPU, convolutions without TF32, which is torch's default there and rounds their input to
    10 bits."""
    with ExitStack() as stack:
        if images.is_cuda:
            now = cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic
            stack.enter_context(cudnn.flags(*now, allow_tf32=False))
        yield


def _verdict(differences: list[float]) -> Flag:
    """differences: between the change of the margin and what the gradient says, as shares, for each
    size of noise that was tried."""
    if not differences:
        return Flag.not_looked_at(
            NAME,
            f"fewer than {FEW} images have a gradient that shows beyond rounding.",
        )

    value = min(differences)
    tripped = value > AGREES
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


def _steps(sample: Sample, here: Tensor, *, bounds: Bounds, least: float) -> Flag:
    """No image has a gradient. Is that since the input is rounded?

    Noise that is 16 times smaller moves a smooth function 16 times less. A rounded input stands
    still, or a 16th of its pixels go over an edge: then it moves about 4 times less.

    here: (B,) the margins; least: smaller changes are rounding of the outputs.
    """
    moves = [
        (sample.heights(sample.nearby(size, bounds)) - here).double()
        for size in (SIZES[1], FINE, COARSE)
    ]
    smaller, small, coarse = (float(move.square().mean().sqrt()) for move in moves)
    share = smaller / small if small else 0.0
    linear = FINE / SIZES[1]

    stand_still = float((moves[0] == 0).double().mean()) > 0.5
    steps = small > least and not 0.5 < share * linear < 2
    tripped = coarse > least and (stand_still or steps)

    return Flag(
        NAME,
        tripped,
        share,
        f"No image has a gradient, and noise of 1/1024 of a pixel's range moves the margin by "
        f"{small:.1e}, noise of a {linear:.0f}th of that by {smaller:.1e}. "
        + (
            "The model rounds its input."
            if tripped
            else "It does not look like rounding: see zero gradients."
        ),
    )
