"""Small tensors that travel together."""

from collections.abc import Iterable, Iterator

from torch import Tensor

BUCKET = 2**24  # how many numbers travel at once


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists, each of ``BUCKET`` numbers and what its last tensor has beyond."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
