"""The bootstrap over seeds and images."""

from math import isnan

import numpy as np
import pytest
from scipy import stats

from ironmoe.bench.study.statistics.bootstrap import pigeonhole


def crossed(rng, seeds, images, of_seed, of_image, of_both):
    return (
        rng.normal(0, of_seed, (seeds, 1))
        + rng.normal(0, of_image, (1, images))
        + rng.normal(0, of_both, (seeds, images))
    )


@pytest.mark.parametrize(("of_seed", "of_image"), [(1.0, 0.0), (0.0, 1.0), (1.0, 3.0)])
def test_the_interval_is_as_wide_as_both_kinds_of_chance_make_it(of_seed, of_image):
    """Without interaction the bootstrap's variance is the sum of the plain ones, of row means over
    S and column means over N; 20,000 draws know a standard deviation to 0.5 %, its quantiles to
    2 %, and for the normal shape of so many values 3 % more is allowed."""
    values = crossed(np.random.default_rng(0), 40, 60, of_seed, of_image, 0.0)
    found = pigeonhole(values, draws=20_000)
    variance = values.mean(1).var() / 40 + values.mean(0).var() / 60
    assert found.mean == pytest.approx(values.mean())
    width = 2 * stats.norm.ppf(0.975) * variance**0.5
    assert found.high - found.low == pytest.approx(width, rel=0.05)


def test_what_images_share_makes_it_wider_and_is_not_taken_for_noise():
    """As many values without structure have a mean that is known much better."""
    rng = np.random.default_rng(1)
    values = crossed(rng, 8, 200, 1.0, 1.0, 1.0)
    shuffled = rng.permutation(values.ravel()).reshape(values.shape)
    found, without = pigeonhole(values), pigeonhole(shuffled)
    assert found.high - found.low > 2 * (without.high - without.low)


def test_it_depends_on_its_seed_alone_and_one_run_has_no_interval():
    values = crossed(np.random.default_rng(2), 5, 20, 1.0, 1.0, 1.0)
    assert pigeonhole(values) == pigeonhole(values.tolist()) != pigeonhole(values, seed=1)
    narrow = pigeonhole(values, confidence=0.5)
    assert pigeonhole(values).low < narrow.low < narrow.high < pigeonhole(values).high
    one = pigeonhole(values[:1])
    assert one.mean == pytest.approx(values[0].mean()) and isnan(one.low) and isnan(one.high)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "rows of one length"),
        ([[]], {}, "at least 1, got lengths \\[0\\]"),
        ([[1.0], [1.0, 2.0]], {}, "got lengths \\[1, 2\\]"),
        ([[1.0]], {"confidence": 1}, "confidence must lie between 0 and 1, got 1"),
    ],
)
def test_other_values_are_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        pigeonhole(values, **options)
