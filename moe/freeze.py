"""Freeze a model's weights for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def freeze_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Turn requires_grad off for every parameter inside the block; restored afterwards, also after
    an exception.

    An input gradient then costs no weight gradient and keeps nothing that only a weight gradient
    would need, in any layer.
    """
    was_required = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in was_required:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter, required in was_required:
            parameter.requires_grad_(required)
