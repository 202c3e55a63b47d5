"""Trends along a ladder, rank correlations, and the permutations that test both."""

from itertools import permutations, product
from math import isnan

import numpy as np
import pytest
from scipy import stats

from ironmoe.bench.study.statistics.correlation import rank_correlation, runs_correlation
from ironmoe.bench.study.statistics.permutation import permutation_test
from ironmoe.bench.study.statistics.trend import trend

RNG = np.random.default_rng(0)
LADDER = RNG.normal(size=(3, 4)) + 0.4 * np.arange(4)
X = [1.0, 2.0, 3.0, 5.0]
IMAGES = RNG.normal(size=(3, 40)).round(1)  # with ties


def test_slopes_are_those_of_least_squares():
    found = trend(LADDER, X)
    assert found.slopes == pytest.approx([np.polyfit(X, row, 1)[0] for row in LADDER])


def test_the_permutation_test_of_a_trend_tries_all_orders_within_each_seed():
    slopes = [[np.polyfit(X, row, 1)[0] for row in permutations(seed)] for seed in LADDER]
    sums = np.array([sum(choice) for choice in product(*slopes)])
    observed = sum(trend(LADDER, X).slopes)
    found = trend(LADDER, X).permutation
    assert found.exact and found.p == pytest.approx(np.mean(np.abs(sums) >= abs(observed) - 1e-9))
    assert found.least == pytest.approx(2 / 24**3)


def test_on_ranks_the_trend_is_pages_test():
    """Two-sided, which doubles Page's one-sided p-value because his L is symmetric."""
    ranks = stats.rankdata(LADDER, axis=1)
    expected = stats.page_trend_test(ranks, ranked=True, method="exact").pvalue
    assert trend(ranks, range(4)).permutation.p == pytest.approx(2 * expected)


def test_drawn_orders_agree_with_all_of_them():
    """Five arms and seven seeds are drawn from; the normal approximation of Page's L is good there,
    and four standard errors of the draws and its own error of 0.005 are allowed."""
    rng = np.random.default_rng(2)
    ranks = stats.rankdata(rng.normal(size=(7, 5)) + 0.45 * np.arange(5), axis=1)
    page = stats.page_trend_test(ranks, ranked=True, method="asymptotic").pvalue
    found = trend(ranks, range(5)).permutation
    assert 0.02 < page < 0.3
    assert not found.exact and found.least == 1e-4
    assert abs(found.p - 2 * page) < 0.005 + 4 * (2 * page / 9_999) ** 0.5
    assert trend(ranks, range(5), seed=1).permutation.p != found.p
    assert trend(ranks, range(5)).permutation == found


def test_blocks_too_large_for_a_list_of_orders_are_shuffled():
    """One block of 60: the correlation test, against scipy's t approximation of Pearson's r."""
    x, y = np.random.default_rng(3).normal(size=(2, 60))
    y += 0.25 * x
    found = permutation_test([(x, y)])
    expected = stats.pearsonr(x, y).pvalue
    assert 0.02 < expected < 0.6
    assert abs(found.p - expected) < 0.01 + 4 * (expected / 9_999) ** 0.5


def test_the_shape_of_a_block_does_not_matter_to_the_null_distribution():
    """Among permutations of one data set p-values are uniform: at most a share α is at most α."""
    x, y = np.arange(5.0), np.array([0.3, 1.0, -2.0, 0.5, 0.9])
    p = [permutation_test([(x, order)]).p for order in permutations(y)]
    for level in (0.05, 0.1, 0.5):
        assert np.mean(np.array(p) <= level) <= level


def test_a_rank_correlation_is_spearmans():
    x, y, _ = IMAGES
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    far = np.where(x > 1, np.inf, x)
    assert rank_correlation(far, y) == pytest.approx(stats.spearmanr(far, y).statistic)


def test_a_partial_correlation_of_runs_is_the_textbooks_formula_on_ranks():
    x, y, z = IMAGES
    xy, xz, yz = (stats.spearmanr(*two).statistic for two in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)) ** 0.5
    assert runs_correlation(x, y, given=z, draws=9).rho == pytest.approx(expected)
    assert runs_correlation(x, y, given=np.ones(40), draws=9).rho == pytest.approx(xy)


def test_a_correlation_given_another_number_is_that_of_residuals():
    x, y, z = IMAGES
    ranks = stats.rankdata(z)
    columns = np.stack([np.ones(40), ranks, ranks**2, ranks**3, z], axis=1)
    left = [
        row - columns @ np.linalg.lstsq(columns, row, rcond=None)[0]
        for row in (stats.rankdata(x), stats.rankdata(y))
    ]
    expected = np.corrcoef(*left)[0, 1]
    assert rank_correlation(x, y, given=z) == pytest.approx(expected)
    assert rank_correlation(x, y, given=np.ones(40)) == pytest.approx(rank_correlation(x, y))
    assert rank_correlation(z, y, given=np.exp(z)) != rank_correlation(z, y, given=z)


def test_a_covariate_that_explains_both_leaves_nothing():
    """On average over runs of few images, too, where a straight line in ranks leaves 0.03."""
    rng = np.random.default_rng(4)
    z = rng.normal(size=2_000)
    x, y = z + rng.normal(size=(2, 2_000))
    assert rank_correlation(x, y) > 0.4 and abs(rank_correlation(x, y, given=z)) < 4 / 2_000**0.5

    rho = []
    for _ in range(1_500):
        z = rng.normal(size=50)
        x, y = 2 * z + rng.normal(size=50), z + rng.normal(size=50)
        rho.append(rank_correlation(x, y, given=z))
    assert abs(np.mean(rho)) < 0.01 + 3 * np.std(rho) / 1_500**0.5 < 0.025
    assert isnan(rank_correlation(z, y, given=z)) and isnan(rank_correlation(np.ones(5), range(5)))


def test_the_correlation_of_runs_is_tested_by_all_orders():
    x, y = IMAGES[0, :6], IMAGES[1, :6]
    found = runs_correlation(x, y)
    every = [stats.spearmanr(x, order).statistic for order in permutations(y)]
    expected = np.mean(np.abs(every) >= abs(stats.spearmanr(x, y).statistic) - 1e-9)
    assert found.permutation.exact and found.permutation.p == pytest.approx(expected)
    assert found.rho == pytest.approx(rank_correlation(x, y))


def test_what_seeds_share_is_no_correlation_of_runs():
    """Both numbers follow the seed and nothing else: over all runs they agree, within seeds they do
    not."""
    rng = np.random.default_rng(5)
    seeds = np.repeat(np.arange(8), 4)
    x, y = 10 * seeds + rng.normal(size=(2, 32))
    assert runs_correlation(x, y).rho > 0.9 and runs_correlation(x, y).permutation.p < 0.001
    within = runs_correlation(x, y, blocks=seeds)
    assert abs(within.rho) < 0.5 and within.permutation.p > 0.01
    tied = runs_correlation(x, x + rng.normal(size=32), blocks=seeds)
    assert tied.rho > 0.4 and tied.permutation.p < 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trend([], X), "values_SA must have rows of 4 numbers"),
        (lambda: trend([[1.0, 2.0]], X), r"rows of 4 numbers, got \[2\]"),
        (lambda: trend([[1.0, 2.0]], [3.0, 3.0]), "at least two different numbers"),
        (lambda: permutation_test([]), "blocks must be at least one"),
        (lambda: permutation_test([([1.0], [1.0, 2.0])]), "equally many and at least one"),
        (lambda: rank_correlation([1.0, 2.0], [1.0, 2.0]), "at least 3, got 2 of x"),
        (lambda: rank_correlation([1.0] * 3, [1.0] * 4), "got 3 of x, 4 of y"),
        (lambda: rank_correlation(range(3), range(3), given=range(2)), "2 of given"),
        (lambda: runs_correlation(range(3), range(3), blocks=[0]), "1 of blocks"),
        (lambda: rank_correlation(range(3), range(3), given=[0, 1, np.inf]), "given must be fin"),
        (lambda: rank_correlation([1.0, np.nan, 2.0], range(3)), "x must hold no NaN, got 1"),
    ],
)
def test_what_cannot_be_tested_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
