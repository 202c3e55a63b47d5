"""Instructions in which the 32 threads of a warp exchange numbers."""

import numpy as np

from ptx.numbers import Array, i64, u32


def shuffle(values: Array, mode: str, lane: Array, clamp: Array) -> Array:
    """shfl: the number of another lane, or the own one where that lane is not of the segment."""
    thread = np.arange(len(values))
    own = thread % 32
    lane, limit, segment = (
        lane.astype(i64) & 31,
        clamp.astype(i64) & 31,
        (clamp.astype(i64) >> 8) & 31,
    )
    last, first = (own & segment) | (limit & ~segment), own & segment
    source = {
        "up": own - lane,
        "down": own + lane,
        "bfly": own ^ lane,
        "idx": first | (lane & ~segment),
    }[mode]
    valid = source >= last if mode == "up" else source <= last
    return values[thread - own + np.where(valid, source, own)]


def reduce(values: Array, operation: str) -> Array:
    """redux: the sum, maximum … over a warp, in each of its threads."""
    reduction = {
        "add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor
    }[operation]  # fmt: skip
    return _everyone(reduction.reduce(values.reshape(-1, 32), axis=1, dtype=values.dtype))


def vote(predicate: Array, mode: str) -> Array:
    """vote: which threads of the warp say yes (u32), or whether all, or any, do (bool)."""
    yes = predicate.reshape(-1, 32)
    if mode == "ballot":
        return _everyone(np.packbits(yes, axis=1, bitorder="little").view(u32).ravel())
    every, some = np.logical_and.reduce(yes, axis=1), np.logical_or.reduce(yes, axis=1)
    return _everyone({"all": every, "any": some, "uni": every | ~some}[mode])


def match(values: Array) -> Array:
    """match.any: which threads of the warp have the same number (u32)."""
    same = values.reshape(-1, 32, 1) == values.reshape(-1, 1, 32)
    return np.packbits(same, axis=2, bitorder="little").view(u32).ravel()


def _everyone(of_warp: Array) -> Array:
    return np.repeat(of_warp, 32)
