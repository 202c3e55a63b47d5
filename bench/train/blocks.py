"""Activation checkpointing of each block of a model."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.train.parallel import blocks


def checkpoint_blocks(model: nn.Module) -> None:
    """Let each block keep its input only and run again in the backward pass.

    The random state is that of the first run, so router noise and dropout repeat, and a token takes
    the same experts. Names of modules and weights stay as they are.

    Raises:
        UserError: the model has no list of blocks.
    """
    found = list(blocks(model))
    if not found:
        raise UserError(
            "--checkpointing needs a model with a list of equal blocks, and "
            f"{type(model).__name__} has none"
        )
    for block in found:
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=True)
        block.forward = again
