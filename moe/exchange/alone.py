"""A process that works by itself for a while, although torch.distributed joins it with others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

_BLOCKS: list[None] = []  # those that this process is in


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process shares no work with others: what it trains or evaluates, it
    trains or evaluates as a program without torch.distributed would. The others may do something
    else meanwhile, or wait."""
    _BLOCKS.append(None)
    try:
        yield
    finally:
        _BLOCKS.pop()


def is_alone() -> bool:
    """Whether there is no other process that this one shares its work with."""
    return bool(_BLOCKS) or not (dist.is_available() and dist.is_initialized())
