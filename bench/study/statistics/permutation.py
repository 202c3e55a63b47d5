"""Permutation tests within blocks: what a sum would be if, within each block, any number of one
list could as well have stood beside any number of the other."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations
from math import factorial, prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Block = tuple[Sequence[float] | Array, Sequence[float] | Array]

MOST_ENUMERATED = 2**16  # ways to permute all blocks; beyond, some are drawn
LARGEST_TABLE = 7  # items of a block whose 5,040 orders are listed
TOLERANCE = 1e-9  # of the sum of the absolute terms: sums that differ by rounding are equal


class Permutation(NamedTuple):
    """p: two-sided; least: how small p can be with that many blocks of these sizes, if no numbers
    are tied; exact: whether all ways were tried."""

    p: float
    least: float
    exact: bool


def permutation_test(blocks: Sequence[Block], *, draws: int = 9_999, seed: int = 0) -> Permutation:
    """Test the sum over blocks and items of x · y, where in each block y may be permuted.

    All ways are tried if there are at most 65,536. Else ``draws`` are drawn, and the observed one
    counts as one more, which keeps the level (Phipson and Smyth 2010, Stat. Appl. Genet. Mol. Biol.
    9, 39).

    Args:
        blocks: x and y of each block, equally long, at least one of them.
        seed: of the draws.

    Raises:
        ValueError: no block, an empty one, or two lengths in one.
    """
    centred = [_centred(x, y) for x, y in blocks]
    if not centred:
        raise ValueError("blocks must be at least one, got none")

    ways = prod(factorial(len(x)) for x, _ in centred)
    observed = sum(float(x @ y) for x, y in centred)
    scale = sum(float(np.abs(x) @ np.abs(y)) for x, y in centred)
    reached = abs(observed) - TOLERANCE * scale
    if ways <= MOST_ENUMERATED:
        return Permutation(float((np.abs(_all(centred)) >= reached).mean()), min(1, 2 / ways), True)

    beyond = int((np.abs(_drawn(centred, draws, seed)) >= reached).sum())
    return Permutation((beyond + 1) / (draws + 1), max(1 / (draws + 1), 2 / ways), False)


def _centred(x: Sequence[float] | Array, y: Sequence[float] | Array) -> tuple[Array, Array]:
    """Both around their means, so that the sum is 0 on average over the ways."""
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(first) != len(second) or not len(first):
        raise ValueError(
            "x and y of a block must be equally many and at least one, "
            f"got {len(first)} and {len(second)}"
        )
    return first - first.sum() / len(first), second - second.sum() / len(second)


def _all(blocks: Sequence[tuple[Array, Array]]) -> Array:
    """The sum in each of the ways."""
    sums = np.zeros(1)
    for x, y in blocks:
        sums = np.add.outer(sums, _table(x, y)).ravel()
    return sums


def _drawn(blocks: Sequence[tuple[Array, Array]], draws: int, seed: int) -> Array:
    """The sum in each of ``draws`` random ways."""
    rng = np.random.default_rng(seed)
    sums = np.zeros(draws)
    for x, y in blocks:
        if len(x) <= LARGEST_TABLE:
            table = _table(x, y)
            sums += table[rng.integers(len(table), size=draws)]
        else:
            sums += y[rng.random((draws, len(y))).argsort(1)] @ x
    return sums


def _table(x: Array, y: Array) -> Array:
    """x · y for every order of y."""
    return y[_orders(len(y))] @ x


@lru_cache
def _orders(items: int) -> NDArray[np.int64]:
    return np.array(list(permutations(range(items))), dtype=np.int64)
