"""Tests and intervals of numbers of which each belongs to one seed."""

from itertools import product
from math import isnan

import numpy as np
import pytest
from scipy import stats

from ironmoe.bench.study.statistics.equivalence import beyond, tost
from ironmoe.bench.study.statistics.holm import holm
from ironmoe.bench.study.statistics.paired import paired
from ironmoe.bench.study.statistics.power import power, runs_needed
from ironmoe.bench.study.statistics.sign_flips import sign_flips
from ironmoe.bench.study.statistics.student import p_above, p_below, p_two_sided

DIFFERENCES = np.random.default_rng(0).normal(0.7, 1, 9)


def summary(values):
    return float(np.mean(values)), float(np.std(values, ddof=1)), len(values)


@pytest.mark.parametrize("bound", [-0.4, 0.0, 2.0])
def test_one_sided_p_values_are_those_of_scipy(bound):
    for test, side in ((p_above, "greater"), (p_below, "less")):
        expected = stats.ttest_1samp(DIFFERENCES, bound, alternative=side).pvalue
        assert test(*summary(DIFFERENCES), bound=bound) == pytest.approx(expected, rel=1e-12)


def test_a_mean_over_seeds_is_that_of_scipys_paired_t_test():
    a, b = np.random.default_rng(1).normal(size=(2, 7))
    found, expected = paired(list(a - b)), stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(expected.pvalue) and found.runs == 7
    assert (found.mean, found.sd) == pytest.approx(summary(a - b)[:2])


def test_one_seed_has_a_mean_and_nothing_else():
    found = paired([2.5])
    assert found.mean == 2.5 and found.runs == 1 and found.p_flips == 1
    assert all(map(isnan, (found.sd, found.low, found.high, found.p)))


def test_differences_that_do_not_scatter_are_told_from_0_unless_they_are_0():
    assert p_two_sided(1.0, 0.0, 3) == 0 and p_two_sided(0.0, 0.0, 3) == 1
    assert tost(1.0, 0.0, 3, margin=2) == 0 and tost(2.0, 0.0, 3, margin=2) == 1
    assert beyond(2.5, 0.0, 3, margin=2) == 0 and beyond(-2.0, 0.0, 3, margin=2) == 1


def by_hand(differences):
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=len(differences))]
    return np.mean(np.array(sums) >= abs(sum(differences)) - 1e-9)


@pytest.mark.parametrize("pairs", [1, 2, 3, 6, 9])
def test_flipping_signs_tries_them_all(pairs):
    found = sign_flips(DIFFERENCES[:pairs].tolist())
    assert found.exact and found.p == by_hand(DIFFERENCES[:pairs])


def test_sign_flips_are_scipys():
    expected = stats.permutation_test(
        (DIFFERENCES,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flips(DIFFERENCES.tolist()).p == pytest.approx(expected.pvalue)


@pytest.mark.parametrize(("pairs", "least"), [(3, 0.25), (4, 0.125), (5, 0.0625), (6, 0.03125)])
def test_fewer_than_six_pairs_cannot_reach_5_percent(pairs, least):
    """The largest of differences all of one sign have the least p-value that there is."""
    found = sign_flips([100.0 + pair for pair in range(pairs)])
    assert found.least == found.p == least
    assert (found.least <= 0.05) == (pairs >= 6)


def test_tied_sums_count_as_reached_whatever_rounding_does():
    differences = [0.1, 0.2, 0.3, -0.1, 0.7]
    assert sign_flips(differences).p == by_hand(differences)
    assert sign_flips([0.0, 0.0]).p == 1


def test_signs_of_many_pairs_are_drawn():
    """17 pairs: within four standard errors of the normal approximation's exact counterpart, and
    the observed signs count as one of the draws."""
    differences = np.random.default_rng(3).normal(0.5, 1, 17).tolist()
    found = sign_flips(differences, draws=20_000)
    exact = sign_flips(differences[:16])
    assert exact.exact and not found.exact and found.least == 1 / 20_001

    signs = 1 - 2 * ((np.arange(2**17)[:, None] >> np.arange(17)) & 1)
    p = np.mean(np.abs(signs @ differences) >= abs(sum(differences)) - 1e-9)
    assert abs(found.p - p) < 4 * (p * (1 - p) / 20_000) ** 0.5
    assert sign_flips([1.0] * 40, draws=99).p == pytest.approx(0.01)


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
def test_equivalence_is_the_larger_of_two_one_sided_tests(margin):
    sides = [
        stats.ttest_1samp(DIFFERENCES, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(DIFFERENCES, margin, alternative="less").pvalue,
    ]
    p = tost(*summary(DIFFERENCES), margin=margin)
    assert p == pytest.approx(max(sides))
    low, high = stats.ttest_1samp(DIFFERENCES, 0).confidence_interval(0.90)
    assert (p <= 0.05) == (-margin < low and high < margin)


def test_beyond_a_margin_is_tested_on_the_nearer_side():
    expected = 2 * stats.ttest_1samp(DIFFERENCES, 0.2, alternative="greater").pvalue
    for sign in (1, -1):
        assert beyond(*summary(sign * DIFFERENCES), margin=0.2) == pytest.approx(expected)
    assert beyond(*summary(DIFFERENCES), margin=5.0) == 1


def test_holms_p_values_are_those_of_a_worked_example():
    """Ranks 1 to 4: times 4, 3, 2, 1, and never less than the one before."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.9})["a"] == 1


def test_what_was_not_tested_costs_holms_correction_nothing():
    found = holm({"a": 0.02, "b": float("nan")})
    assert found["a"] == 0.02 and isnan(found["b"])
    assert holm({}) == {}


def test_holm_rejects_a_true_hypothesis_in_5_percent_of_studies_at_most():
    """Three claims without effect beside two with a sure one."""
    rng = np.random.default_rng(4)
    wrong = 0
    for row in rng.random((4_000, 3)):
        p = {"d": 0.0, "e": 1e-9} | dict(zip("abc", row, strict=True))
        wrong += min(holm(p)[name] for name in "abc") <= 0.05
    assert wrong <= stats.binom.isf(1e-3, 4_000, 0.05)
    assert wrong >= stats.binom.ppf(1e-3, 4_000, 1 - (1 - 0.05 / 3) ** 3)


@pytest.mark.parametrize(("d", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_runs_needed_are_those_of_the_tables(d, pairs):
    """Cohen's d, two-sided 5 %, power 80 %: G*Power's matched pairs."""
    assert runs_needed(2 * d, 2.0) == pairs


@pytest.mark.parametrize("runs", [2, 3, 8, 50])
def test_power_is_that_of_the_noncentral_t_distribution(runs):
    shift, critical = 0.6 * runs**0.5, stats.t.ppf(0.995, runs - 1)
    expected = stats.nct.sf(critical, runs - 1, shift) + stats.nct.cdf(-critical, runs - 1, shift)
    assert power(3.0, 5.0, runs, level=0.01) == pytest.approx(expected, rel=1e-6)
    assert power(-3.0, 5.0, runs, level=0.01) == power(3.0, 5.0, runs, level=0.01)


def test_so_many_runs_are_enough_and_one_fewer_is_not():
    for sd in (0.1, 1.8, 5.1, 30.0):
        needed = runs_needed(2.0, sd, level=0.01)
        assert power(2.0, sd, needed, level=0.01) >= 0.8
        assert needed == 2 or power(2.0, sd, needed - 1, level=0.01) < 0.8
    assert runs_needed(2.0, 0.0) == 2 and runs_needed(1e-6, 1.0) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: p_above(1.0, 1.0, 1), "runs must be at least 2, got 1"),
        (lambda: paired([]), "values must be at least one"),
        (lambda: sign_flips([]), "differences must be at least one"),
        (lambda: tost(0.0, 1.0, 3, margin=0), "margin must be more than 0, got 0"),
        (lambda: beyond(0.0, 1.0, 3, margin=-1), "margin must be more than 0, got -1"),
        (lambda: holm({"a": 1.5}), r"between 0 and 1, got {'a': 1.5}"),
        (lambda: runs_needed(0.0, 1.0), "effect must be a number other than 0, got 0.0"),
        (lambda: runs_needed(1.0, float("nan")), "sd must be at least 0, got nan"),
    ],
)
def test_what_cannot_be_tested_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
