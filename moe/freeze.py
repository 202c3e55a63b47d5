"""Freeze a model's weights for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ironmoe.kernels.checks import check_module
from ironmoe.moe.sharded import fsdp_modules


@contextmanager
def freeze_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Turn requires_grad off for every parameter inside the block; restored afterwards, also after
    an exception.

    An input gradient then costs no weight gradient and keeps nothing that only a weight gradient
    would need, in any layer.

    Parameters that FSDP2 shards (``fully_shard``) stay as they are, because FSDP2 takes over
    requires_grad when it gathers them: weights that it gathers here and keeps would get no gradient
    in the next step of a training. ``torch.autograd.grad(loss, [images])`` computes no weight
    gradient either way.

    Raises:
        TypeError: the model is no module.
    """
    check_module(model)
    sharded = {p for module in fsdp_modules(model) for p in module.parameters()}
    was_required = [(p, p.requires_grad) for p in model.parameters() if p not in sharded]
    try:
        for parameter, _ in was_required:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter, required in was_required:
            parameter.requires_grad_(required)
