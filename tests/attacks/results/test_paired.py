"""Two accuracies on the same images: the test and the interval, against closed forms, scipy, a
definition by enumeration, and the exact coverage."""

import itertools
from math import comb, log, sqrt

import numpy as np
import pytest
import torch
from scipy.special import gammaln
from scipy.stats import binomtest, norm

from ironmoe.attacks import paired_difference
from ironmoe.attacks.results.paired import MCNEMAR, Counts, mcnemar


def of_counts(both, only_one, only_other, neither, **options):
    one = [1] * (both + only_one) + [0] * (only_other + neither)
    other = [1] * both + [0] * only_one + [1] * only_other + [0] * neither
    return paired_difference(one, other, **options)


@pytest.mark.parametrize(
    ("only_one", "only_other", "p_value"),
    [(1, 0, 1), (5, 0, 2 / 32), (3, 1, 10 / 16), (2, 2, 1), (8, 1, 20 / 512), (0, 10, 2 / 1024)],
)
def test_p_values_of_small_tables_are_the_fractions_of_the_binomial(only_one, only_other, p_value):
    result = of_counts(7, only_one, only_other, 4)
    assert (result.p_value, result.test) == (p_value, MCNEMAR)
    assert result.counts == Counts(7, only_one, only_other, 4)


def test_p_values_are_those_of_scipy_and_stay_exact_for_many_images():
    for only_one, only_other in [(17, 40), (3, 60), (300, 251), (5000, 5200)]:
        expected = binomtest(only_one, only_one + only_other).pvalue
        assert mcnemar(only_one, only_other) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(0, 1000) == 2.0**-999


def test_images_that_are_right_in_both_or_in_none_do_not_change_the_p_value():
    assert of_counts(0, 9, 2, 0).p_value == of_counts(300, 9, 2, 1000).p_value


@pytest.mark.parametrize("counts", [(7, 5, 1, 4), (0, 3, 0, 0), (10, 0, 0, 2), (0, 0, 1, 0)])
def test_exchanged_runs_give_the_opposite_difference(counts):
    both, only_one, only_other, neither = counts
    result, exchanged = of_counts(*counts), of_counts(both, only_other, only_one, neither)
    assert exchanged.p_value == result.p_value
    assert exchanged.difference == -result.difference
    assert exchanged.interval == pytest.approx([-end for end in reversed(result.interval)])


def test_a_run_beside_itself_differs_by_nothing_and_its_interval_still_has_a_width():
    for right in (0, 3, 10):
        result = of_counts(right, 0, 0, 10 - right)
        assert (result.difference, result.p_value) == (0, 1)
        half = norm.ppf(0.975) * sqrt(2) / 12
        assert result.interval == pytest.approx((-half, half))


def test_no_image_says_nothing_and_one_image_little():
    nothing = paired_difference([], [])
    assert nothing.images == 0 and nothing.accuracy_one != nothing.accuracy_one
    assert (nothing.p_value, nothing.interval) == (1, (-1, 1))
    single = paired_difference([1], [0])
    assert (single.difference, single.p_value, single.images) == (1, 1, 1)
    assert single.interval[0] < 0 and single.interval[1] == 1


def test_the_interval_is_walds_with_one_image_more_on_either_side():
    """Bonett and Price (2012) write it with p12 and p21; here f and g images are right in one run
    only."""
    for f, g, n in [(12, 2, 50), (0, 7, 30), (90, 80, 400)]:
        p12, p21 = (f + 1) / (n + 2), (g + 1) / (n + 2)
        for confidence in (0.95, 0.8):
            z = norm.ppf(0.5 + confidence / 2)
            half = z * sqrt((p12 + p21 - (p12 - p21) ** 2) / (n + 2))
            found = of_counts(n - f - g, f, g, 0, confidence=confidence).interval
            assert found == pytest.approx((p12 - p21 - half, p12 - p21 + half))


@pytest.mark.parametrize("images", [10, 40, 150])
def test_the_interval_covers_the_true_difference(images):
    """The exact coverage, from the probability of every table. A normal approximation may miss the
    95 % by little."""
    tables = [(f, g) for f in range(images + 1) for g in range(images + 1 - f)]
    ends = np.array([of_counts(images - f - g, f, g, 0).interval for f, g in tables])
    f, g = np.array(tables).T
    shares = [0.005, 0.02, 0.1, 0.25, 0.4]

    covered = []
    for one, other in itertools.product(shares, shares):
        chances = np.exp(
            gammaln(images + 1) - gammaln(f + 1) - gammaln(g + 1) - gammaln(images - f - g + 1)
            + f * log(one) + g * log(other) + (images - f - g) * log(1 - one - other)
        )  # fmt: skip
        inside = (ends[:, 0] <= one - other) & (one - other <= ends[:, 1])
        covered.append(chances[inside].sum())
    assert min(covered) > 0.93 and np.mean(covered) > 0.95


def test_the_interval_scales_with_the_values():
    """Values of 0 and 0.3 differ by 0.3 times what values of 0 and 1 differ by."""
    one, other = torch.tensor([1.0] * 9 + [0.0] * 3), torch.tensor([0.0] * 4 + [1.0] * 8)
    plain = paired_difference(one, other).interval
    scaled = paired_difference(0.3 * one, 0.3 * other).interval
    assert scaled == pytest.approx([0.3 * end for end in plain], rel=1e-6)


def test_the_interval_covers_the_difference_of_two_random_models():
    """64 passes over each of 60 images, which are right in other shares of them; 2,000 samples. The
    allowance is five standard deviations."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        shares = generator.beta(4, 1, 60), generator.beta(3, 1, 60)
        one, other = (generator.binomial(32, share) / 32 for share in shares)
        low, high = paired_difference(one, other).interval
        covered += low <= 4 / 5 - 3 / 4 <= high
    assert covered / 2000 > 0.95 - 5 * sqrt(0.95 * 0.05 / 2000)


def test_the_sign_flip_test_is_mcnemars_where_values_are_0_and_1():
    """All differences of one size, whatever it is, are a table of McNemar's."""
    one, other = torch.tensor([0.5, 0.75, 1.0, 0.5, 0.0]), torch.tensor([0.0, 0.25, 0.5, 1.0, 0.0])
    scaled = paired_difference(one, other)
    assert scaled.p_value == mcnemar(3, 1) and scaled.counts is None
    assert scaled.test != MCNEMAR


def test_values_between_0_and_1_are_compared_by_all_flips_of_their_signs():
    """The differences are 0.5, 0.2, −0.1 and 0: of 8 ways to give signs, 2 reach a sum of 0.8 and
    2 more one of 0.6."""
    result = paired_difference([0.9, 0.7, 0.2, 0.3], [0.4, 0.5, 0.3, 0.3])
    assert result.p_value == 4 / 8
    assert result.difference == pytest.approx(0.6 / 4)
    assert "sign-flip" in result.test


def test_many_differences_are_tested_by_a_normal_approximation_that_agrees_with_the_exact_test():
    exact = of_counts(0, 60, 41, 0).p_value
    differences = [1] * 60 + [-1] * 41
    one = [0.5 + 0.3 * d for d in differences] + [0.5 + 1e-9]
    result = paired_difference(one, [0.5] * 102)
    assert "normal" in result.test
    point = comb(101, 41) / 2**101
    assert abs(result.p_value - exact) < 1.1 * point  # the mass at the value seen counts half


def test_what_no_accuracy_can_be_is_refused():
    with pytest.raises(ValueError, match="one must hold values from 0 to 1, got nan"):
        paired_difference([float("nan")], [1])
    with pytest.raises(ValueError, match="other must hold values from 0 to 1, got 2"):
        paired_difference([1], [2])
    with pytest.raises(ValueError, match="same length, got 1 and 2"):
        paired_difference([1], [1, 0])
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 95"):
        paired_difference([1], [1], confidence=95)
