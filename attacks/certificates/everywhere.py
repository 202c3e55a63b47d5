"""Work that every process does on its share of the images. An error that one of them meets must not
leave the others waiting for it."""

import sys
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ironmoe.attacks.evaluation.sharding import Shard

Result = TypeVar("Result")


class _End(NamedTuple):
    """How the work of one process ended: with a result, or with an error."""

    result: object
    error: str | None = None


def on_every_process(shard: Shard, work: Callable[[], Result]) -> list[Result]:
    """What ``work`` returned on each process, in the order of ranks, on every process.

    All processes must come here. One that meets an error says so at once, and raises it when the
    others are done.

    Raises:
        Exception: whatever ``work`` raised on this process.
        RuntimeError: it raised something on another process.
    """
    if shard.world == 1:
        return [work()]

    try:
        result = work()
    except Exception as error:
        met = f"{type(error).__name__}: {error}"
        print(f"process {shard.rank} met {met}", file=sys.stderr, flush=True)
        shard.gather_objects(_End(None, met))
        raise

    ends: list[_End] = shard.gather_objects(_End(result))
    for rank, end in enumerate(ends):
        if end.error is not None:
            raise RuntimeError(f"process {rank} met {end.error}")
    return [end.result for end in ends]  # type: ignore[misc]
