"""Whether a model judges each image by itself and gives it one answer, which every measurement
takes for granted: one backward pass serves a whole batch, and a change is that of one function.

Shape suffixes: B images.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ironmoe.attacks.evaluation.checks.distances import DIFFERS, apart
from ironmoe.attacks.smoothness.asking import Asked, measuring
from ironmoe.attacks.smoothness.precision import coarsest_unit

# So many images show it.
IMAGES = 8
# Rounding depends on the size of a batch: in units of the lowest precision that is known.
UNITS = 4
# Rounding moves a router at a tie, too, and so few images by much; a model that is random or looks
# at its batch moves nearly all of them.
MANY = 1 / 2


@contextmanager
def measured(asked: Asked, x: Tensor) -> Iterator[None]:
    """``measuring`` the model, after a look at the first images (B, …): it costs one forward pass
    of them together and one in smaller batches.

    Raises:
        ValueError: images influence each other, or the model is random; inside the block, a
            checkpoint that refuses the gradients of images.
    """
    with measuring(asked.model):
        _look_at(asked, x)
        with _explaining_checkpoints():
            yield


@torch.no_grad()
def _look_at(asked: Asked, x: Tensor) -> None:
    few = min(IMAGES, len(x))
    if not few:
        return
    some, images = asked.part(slice(0, few)), x[:few]
    together = some(images)

    in_parts = torch.empty_like(together)
    for part in (slice(0, None, 2), slice(1, None, 2)):  # each has other company than before
        if len(images[part]):
            in_parts[part] = some.part(part)(images[part])
    if not _differ(together, in_parts, asked, x):
        return

    if _differ(together, some(images), asked, x):
        raise ValueError(
            "model must give one answer to one image in eval mode to be measured, got "
            f"{type(asked.model).__name__}, which is random"
        )
    raise ValueError(
        "model must judge each image by itself to be measured, got "
        f"{type(asked.model).__name__}, whose images influence each other: it gave other logits "
        f"for the same {few} images in smaller batches"
    )


def _differ(logits: Tensor, others: Tensor, asked: Asked, x: Tensor) -> bool:
    """Whether most of the answers lie further apart than rounding makes them."""
    rounding = max(DIFFERS, UNITS * coarsest_unit(asked.model, x.dtype))
    return int((apart(logits, others) > rounding).sum()) > MANY * len(logits)


@contextmanager
def _explaining_checkpoints() -> Iterator[None]:
    """ValueError in place of torch's error: a checkpoint that does not take ``autograd.grad``."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error) or ".grad()" not in str(error):
            raise
        raise ValueError(
            "model must give the gradient of its images alone, got one with activation "
            "checkpointing that does not: checkpoint(…, use_reentrant=False) does"
        ) from error
