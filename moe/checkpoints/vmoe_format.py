"""The V-MoE format: the names and numbers that reader and writer share.

An index file ``<prefix>.index`` lists the arrays (leaves) and where their parts lie. Data files
``<prefix>.data-00000-of-0000n`` (shards) hold the parts. Both are msgpack. Source: vmoe/checkpoints
of github.com/google-research/vmoe.
"""

import math
from pathlib import Path
from typing import Any

VERSION = "20220622"  # files older than this have none
CHUNKS_KEY = "__msgpack_array_chunk_a87ca2__"  # marks a data file

# msgpack extension codes
NDARRAY = 1
SLICES = 6
INDEX_INFO = 8

MAX_PATH = 1000
MAX_ITEMS = 1 << 16  # msgpack allocates a list by the length it claims: this bounds it

Box = tuple[tuple[int, int], ...]  # a part of an array: (start, stop) along each axis


def shard_file(base: str, shard: int, shards: int) -> Path:
    """The data file of a number, of a V-MoE checkpoint that has ``shards`` of them."""
    return Path(f"{base}.data-{shard:05d}-of-{shards:05d}")


def box_size(box: Box) -> int:
    """Number of elements of a part."""
    return math.prod(stop - start for start, stop in box)


def box_slices(box: Box) -> tuple[Any, ...]:
    """An index that gives a view of the part; thanks to its dots, of an array without axes too."""
    return (*(slice(*axis) for axis in box), ...)


def msgpack_module() -> Any:
    """msgpack, or an ImportError that says how to get it."""
    try:
        import msgpack
    except ImportError as error:
        raise ImportError("V-MoE checkpoints need msgpack: pip install msgpack") from error
    return msgpack
