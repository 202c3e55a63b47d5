"""Work that several processes do together: where one of them fails, all of them hear of it, and
none is left waiting. With one process, and without ``torch.distributed``, it is plain work."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ironmoe.moe.checkpoints.errors import CheckpointError

T = TypeVar("T")


def number_of_processes() -> int:
    """1 where ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if _is_distributed() else 1


def process_number() -> int:
    """From 0; 0 where ``torch.distributed`` is not initialised."""
    return dist.get_rank() if _is_distributed() else 0


def by_all(work: Callable[[], T]) -> list[T]:
    """What ``work`` returns in each process, in the order of the processes; it can be pickled.

    CheckpointError, in every process: the first error that one of them met, with its number.
    """
    outcomes: list[Any] = [_outcome(work)] * number_of_processes()
    if number_of_processes() > 1:
        dist.all_gather_object(outcomes, outcomes[0])
    for number, (_, error) in enumerate(outcomes):
        _raise(error, number)
    return [result for result, _ in outcomes]


def by_first(work: Callable[[], T]) -> T:
    """What ``work`` returns in process 0, which alone does it. Errors are those of ``by_all``."""
    outcomes: list[Any] = [_outcome(work) if process_number() == 0 else None]
    if number_of_processes() > 1:
        dist.broadcast_object_list(outcomes, src=0)
    result, error = outcomes[0]
    _raise(error, 0)
    return result


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _outcome(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except CheckpointError as error:
        return None, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _raise(error: str | None, number: int) -> None:
    if error is not None and number_of_processes() > 1:
        raise CheckpointError(f"process {number}: {error}")
    if error is not None:
        raise CheckpointError(error)
