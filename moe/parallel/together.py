"""Work that several processes do together: where one of them fails, all of them hear of it, and
none is left waiting. With one process, and without ``torch.distributed``, it is plain work."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch.distributed as dist

from ironmoe.moe.checkpoints.errors import CheckpointError
from ironmoe.moe.exchange.alone import is_alone
from ironmoe.moe.exchange.errors import ExchangeError, naming_missing_at
from ironmoe.moe.exchange.group import every_rank

T = TypeVar("T")


def number_of_processes() -> int:
    """1 where ``torch.distributed`` is not initialised, or this process works by itself."""
    return 1 if is_alone() else dist.get_world_size()


def process_number() -> int:
    """From 0; 0 where this process works by itself."""
    return 0 if is_alone() else dist.get_rank()


def by_all(work: Callable[[], T]) -> list[T]:
    """What ``work`` returns in each process, in the order of the processes; it can be pickled.

    Raises:
        CheckpointError: in every process, with the first error that one of them met, and its rank.
        ExchangeError: a process is missing.
    """
    own = _outcome(work)
    outcomes = every_rank().each(own) if number_of_processes() > 1 else [own]
    for rank, (_, error) in enumerate(outcomes):
        if error is not None:
            raise CheckpointError(f"rank {rank}: {error}" if len(outcomes) > 1 else error)
    return [result for result, _ in outcomes]


def by_first(work: Callable[[], T]) -> T:
    """What ``work`` returns in process 0, which alone does it. Errors are those of ``by_all``."""
    results: list[Any] = by_all(lambda: work() if process_number() == 0 else None)
    return results[0]


def by_each(work: Callable[[], T]) -> T:
    """What ``work`` returns in this process, if none of them fails in it.

    Raises:
        Exception: that of ``work`` in this process.
        CheckpointError: it failed in another process; with its rank.
        ExchangeError: a process is missing.
    """
    made: list[T] = []
    own: list[Exception] = []

    def attempt() -> None:
        try:
            made.append(work())
        except Exception as error:
            own.append(error)
            raise

    try:
        by_all(attempt)
    except CheckpointError:
        if not own:
            raise
    if own:
        raise own[0]
    return made[0]


def naming_ranks(what: str = "an exchange between ranks") -> AbstractContextManager[None]:
    """Inside the block, an error of any exchange of ``torch.distributed`` becomes an
    ``ExchangeError``, which says which rank is missing. Layers with experts name it by themselves;
    FSDP2, DTensor, and collectives of your own do not.

    Other errors stay as they are. The first block in a program is an exchange of all ranks, unless
    ``parallelize`` came before. Without ``torch.distributed`` the block changes nothing.

    Args:
        what: fails, for the message.

    Raises:
        ExchangeError: inside the block, where a rank has ended, or an exchange took longer than the
            timeout of its group.
    """
    several = number_of_processes() > 1
    return naming_missing_at(every_rank().members, what) if several else nullcontext()


def _outcome(work: Callable[[], T]) -> tuple[Any, str | None]:
    try:
        return work(), None
    except CheckpointError as error:
        return None, str(error)
    except ExchangeError:
        raise  # nothing can be told to all any more
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
