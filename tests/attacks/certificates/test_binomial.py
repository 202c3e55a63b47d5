"""Binomial tails and bounds, against sums in rational numbers, closed forms and scipy."""

import math
from fractions import Fraction

import pytest
import scipy.stats

from ironmoe.attacks.certificates.binomial import coin_p_value, lower_bound, upper_tail

# What rounding of log Γ comes to for the trials below.
ROUNDING = 1e-9


def exact_tail(successes, trials, probability):
    return sum(
        math.comb(trials, count) * probability**count * (1 - probability) ** (trials - count)
        for count in range(successes, trials + 1)
    )


@pytest.mark.parametrize("probability", [Fraction(1, 2), Fraction(1, 100), Fraction(97, 100)])
def test_a_tail_is_the_sum_of_its_terms(probability):
    for trials in (1, 2, 7, 60):
        for successes in range(trials + 1):
            exact = float(exact_tail(successes, trials, probability))
            found = upper_tail(successes, trials, float(probability))
            assert found == pytest.approx(exact, rel=ROUNDING)
    assert upper_tail(4, 3, 0.5) == upper_tail(1, 3, 0.0) == 0
    assert upper_tail(0, 3, 0.0) == upper_tail(3, 3, 1.0) == 1


@pytest.mark.parametrize("trials", [1, 10, 1_000, 100_000])
@pytest.mark.parametrize("alpha", [0.05, 0.001, 1e-6])
def test_the_lower_bound_is_that_of_clopper_and_pearson(trials, alpha):
    assert lower_bound(0, trials, alpha) == 0
    for share in (1e-4, 0.3, 0.5, 0.9, 0.999):
        count = max(1, round(share * trials))
        wanted = scipy.stats.beta.ppf(alpha, count, trials - count + 1)
        assert lower_bound(count, trials, alpha) == pytest.approx(wanted, rel=ROUNDING)
    all_agree = alpha ** (1 / trials)
    assert lower_bound(trials, trials, alpha) == pytest.approx(all_agree, rel=ROUNDING)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.7, 0.99, 1 - 1e-6])
def test_the_lower_bound_keeps_its_definition_for_a_large_alpha(alpha):
    """P(X ≥ k) = alpha in rational numbers; from some alpha on the bound lies above k / n."""
    for trials in (1, 2, 9, 60):
        for successes in {1, trials // 2 or 1, trials}:
            bound = lower_bound(successes, trials, alpha)
            tail = exact_tail(successes, trials, Fraction(bound))
            assert float(tail) == pytest.approx(alpha, rel=ROUNDING)
            assert 1 - float(tail) == pytest.approx(1 - alpha, rel=1e-6)
            wanted = scipy.stats.beta.ppf(alpha, successes, trials - successes + 1)
            assert bound == pytest.approx(wanted, rel=ROUNDING)
    assert lower_bound(50, 100, 0.99) > 0.6


def test_the_p_value_is_that_of_the_two_sided_binomial_test():
    assert coin_p_value(0, 0) == 1
    for count, other in [
        (1, 0),
        (5, 5),
        (9, 2),
        (2, 9),
        (60, 40),
        (5_200, 4_800),
        (50_600, 49_400),
    ]:
        wanted = scipy.stats.binomtest(count, count + other, 0.5).pvalue
        assert coin_p_value(count, other) == pytest.approx(wanted, rel=ROUNDING)
