"""What a process sends to others: counted where it is handed to torch.distributed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Traffic:
    """What this process has sent to other ranks of its groups.

    Attributes:
        rows: bytes of rows, there and back, forward and backward.
        counts: bytes of the numbers that ranks tell each other first.
        sums: bytes that it gave into sums over ranks.
        in_step: bytes that ranks in step give each other around the model (``in_step``).
        exchanges: how many of all these there were.
    """

    rows: int = 0
    counts: int = 0
    sums: int = 0
    in_step: int = 0
    exchanges: int = 0


_COUNTED: list[Traffic] = []


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count what layers with expert parallelism send from this process inside the block."""
    traffic = Traffic()
    _COUNTED.append(traffic)
    try:
        yield traffic
    finally:
        # not remove(), which would take an equal one
        _COUNTED[:] = [other for other in _COUNTED if other is not traffic]


def count(kind: str, to_each: Sequence[int], own: int) -> None:
    """Note one exchange. to_each: bytes for each rank of the group; own: the place of this one."""
    for traffic in _COUNTED:
        sent = sum(to_each) - to_each[own]
        setattr(traffic, kind, getattr(traffic, kind) + sent)
        traffic.exchanges += 1
