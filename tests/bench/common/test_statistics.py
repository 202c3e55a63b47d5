"""Means of runs and of pairs of runs."""

from math import isnan

import numpy as np
import pytest
from scipy import stats

from ironmoe.bench.common.statistics import paired_difference, spread


def test_paired_differences_are_those_of_the_paired_t_test():
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    found = paired_difference(list(a), list(b))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.mean == pytest.approx((a - b).mean()) and found.pairs == 6
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.decided == (expected.low > 0 or expected.high < 0)

    one = paired_difference([2.0], [1.0])
    assert one.mean == 1 and isnan(one.low) and not one.decided
    same = paired_difference([2.0, 3.0], [1.0, 2.0])
    assert (same.low, same.high) == (1, 1) and same.decided
    assert isnan(spread([4.0]).sd) and spread([1.0, 3.0]).sd == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0, 2.0]), "equally many, got 1 and 2"),
        (([], []), "at least one"),
        (([1.0], [1.0], 1.0), "confidence must lie between 0 and 1, got 1.0"),
    ],
)
def test_differences_of_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(*arguments)
