"""Activation checkpointing of each block of a model."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ironmoe.attacks.training.checks import BATCH_NORMS
from ironmoe.bench.common.user_error import UserError
from ironmoe.moe.parallel.blocks import blocks


def checkpoint_blocks(model: nn.Module) -> None:
    """Let each block keep its input only and run again in the backward pass.

    The random state is that of the first run, so router noise and dropout repeat, and a token takes
    the same experts; running statistics of batch norm come from the first run alone. Names of
    modules and weights stay as they are.

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
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
        norms = [module for module in block.modules() if isinstance(module, BATCH_NORMS)]
        if norms:
            options["context_fn"] = partial(_contexts, cast(Sequence[nn.BatchNorm1d], norms))
        block.forward = partial(checkpoint, block.forward, **options)


def _contexts(norms: Sequence[nn.BatchNorm1d]) -> tuple[AbstractContextManager[None], ...]:
    """Around the first run of a block, and around the second."""
    return nullcontext(), _keeping_statistics(norms)


@contextmanager
def _keeping_statistics(norms: Sequence[nn.BatchNorm1d]) -> Iterator[None]:
    """Inside the block these layers of batch norm see a batch without learning from it."""
    momenta = [norm.momentum for norm in norms]
    counts = [_copy(norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # running statistics keep all that they are
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)


def _copy(count: Tensor | None) -> Tensor | None:
    return None if count is None else count.clone()
