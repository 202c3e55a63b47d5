"""Rank correlations: of the images of one model, which give one number a run, and of runs."""

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ironmoe.bench.study.statistics.permutation import Permutation, permutation_test

Numbers = Sequence[float] | NDArray[np.float64]
LEAST_SPREAD = 1e-9  # a share of the ranks' own; less is rounding


def rank_correlation(x: Numbers, y: Numbers, *, given: Numbers | None = None) -> float:
    """Spearman's ρ of x and y; with ``given``, of what is left of their ranks after a cubic curve
    in the ranks of ``given`` and a straight line in ``given`` itself. NaN where x or y has nothing
    left that differs.

    A straight line in ranks, the usual partial correlation, leaves a part of what ``given`` does:
    the fewer the numbers, the more, which over many runs becomes a correlation that is not there.

    Over the images of one model it is one number of that model, and no p-value comes from it.

    Args:
        x, y, given: equally many numbers, at least 3, none NaN; infinite x and y are ranked, too.

    Raises:
        ValueError: other numbers.
    """
    groups = np.zeros(len(x), np.int64)
    first, second = _ranks(x, "x", len(x), groups), _ranks(y, "y", len(x), groups)
    if given is not None:
        curves = _curves(np.asarray(given, np.float64), _ranks(given, "given", len(x), groups))
        first, second = _without(first, curves), _without(second, curves)
    return _cosine(first, second)


class RunsCorrelation(NamedTuple):
    """rho: the correlation of runs within their blocks; permutation: its test."""

    rho: float
    permutation: Permutation


def runs_correlation(
    x: Numbers,
    y: Numbers,
    *,
    given: Numbers | None = None,
    blocks: Sequence[int] | None = None,
    draws: int = 9_999,
    seed: int = 0,
) -> RunsCorrelation:
    """The rank correlation of two numbers of each run, tested by permutation.

    With ``blocks`` ranks are taken around the mean of their block, and runs change places within
    it only. With ``given`` it is the partial rank correlation, of what a straight line in the ranks
    of ``given`` leaves; residuals are permuted, which is approximate.

    Args:
        x, y, given: as for ``rank_correlation``, one number a run.
        blocks: of each run, its seed.
        draws, seed: of permutations, where there are too many to try them all.

    Raises:
        ValueError: as ``rank_correlation``.
    """
    groups = _numbered([0] * len(x) if blocks is None else blocks)
    first, second = _ranks(x, "x", len(x), groups), _ranks(y, "y", len(x), groups)
    if given is not None:
        line = _ranks(given, "given", len(x), groups)[:, None]
        first, second = _without(first, line), _without(second, line)

    parts = [(first[groups == group], second[groups == group]) for group in range(groups.max() + 1)]
    test = permutation_test(parts, draws=draws, seed=seed)
    return RunsCorrelation(_cosine(first, second), test)


def _cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    size = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / size if size else nan


def _ranks(
    numbers: Numbers, name: str, count: int, groups: NDArray[np.int64]
) -> NDArray[np.float64]:
    values = np.asarray(numbers, np.float64)
    if len(values) != count or count < 3 or len(groups) != count:
        raise ValueError(
            f"x, y, given and blocks must be equally many and at least 3, got {count} of x, "
            f"{len(values)} of {name} and {len(groups)} of blocks"
        )
    if np.isnan(values).any():
        raise ValueError(f"{name} must hold no NaN, got {int(np.isnan(values).sum())}")

    ranks = _ranked(values)
    means: NDArray[np.float64] = np.bincount(groups, ranks) / np.bincount(groups)
    return ranks - means[groups]


def _ranked(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; ties get the mean of theirs."""
    _, place, ties = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (ties.cumsum() - (ties - 1) / 2)[place]
    return ranks


def _numbered(blocks: Sequence[int]) -> NDArray[np.int64]:
    """Each block by a number from 0."""
    return np.unique(np.asarray(blocks), return_inverse=True)[1]


def _curves(values: NDArray[np.float64], ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 4) of a covariate, each column around its mean: three powers of its ranks, which bend,
    and its values, whose gaps the ranks do not have."""
    if not np.isfinite(values).all():
        raise ValueError("given must be finite, got an infinite number")
    scaled = ranks / max(1.0, float(np.abs(ranks).max()))
    columns = [scaled, scaled**2, scaled**3, values]
    centred: NDArray[np.float64] = np.stack([each - each.mean() for each in columns], axis=1)
    sizes = np.linalg.norm(centred, axis=0)
    return centred / np.where(sizes > 0, sizes, 1)


def _without(ranks: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the best sum of the columns (N, …) leaves."""
    best = np.linalg.lstsq(columns, ranks, rcond=None)[0]
    left: NDArray[np.float64] = ranks - columns @ best
    return left if left @ left > LEAST_SPREAD * (ranks @ ranks) else np.zeros_like(left)
