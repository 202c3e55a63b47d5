"""Few combinations in which every two values of different parameters still meet."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value a parameter that cover every pair of values of two parameters.

    Most faults need no more than two values to meet. The choice is greedy and always the same: the
    next combination is the one of the full product with the most pairs that none before has.
    """
    # By position, because values need not be hashable.
    candidates = list(product(*(range(len(values)) for values in parameters)))
    open_pairs = {pair for chosen in candidates for pair in _pairs(chosen)}
    rows = []
    while open_pairs:
        best = max(candidates, key=lambda chosen: len(open_pairs & _pairs(chosen)))
        open_pairs -= _pairs(best)
        rows.append(tuple(values[place] for values, place in zip(parameters, best, strict=True)))
    return rows


def _pairs(chosen: tuple[int, ...]) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    """Every two of (parameter, place of its value)."""
    return set(combinations(enumerate(chosen), 2))
