"""Exact binomial tails, and what they say of a probability that nobody knows."""

import math
from functools import lru_cache

# Terms below this share of the sum do not change it.
NEGLIGIBLE = 1e-17


def upper_tail(successes: int, trials: int, probability: float) -> float:
    """P(X ≥ successes) for X successes in so many independent trials.

    Terms of one sign are added from the largest one on, so that nothing cancels; the relative error
    is that of ``math.lgamma``, about 1e-10 for 100,000 trials.
    """
    if successes <= 0:
        return 1.0
    if successes > trials or probability <= 0:
        return 0.0
    if probability >= 1:
        return 1.0

    if successes < trials * probability:
        return 1 - upper_tail(trials - successes + 1, trials, 1 - probability)

    odds = probability / (1 - probability)
    total = term = 1.0
    for count in range(successes, trials):
        term *= (trials - count) / (count + 1) * odds
        total += term
        if term < NEGLIGIBLE * total:
            break
    return math.exp(_log_probability(successes, trials, probability)) * total


def _log_probability(successes: int, trials: int, probability: float) -> float:
    """log P(X = successes)."""
    failures = trials - successes
    ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(failures + 1)
    return ways + successes * math.log(probability) + failures * math.log1p(-probability)


@lru_cache(maxsize=4096)
def lower_bound(successes: int, trials: int, alpha: float) -> float:
    """The one-sided lower confidence bound of Clopper and Pearson (1934) for a probability: above
    it with a probability of at most ``alpha``, whatever the probability is.

    It is the p at which P(X ≥ successes) = alpha, the quantile ``beta.ppf(alpha, k, n − k + 1)`` of
    other libraries, and 0 without a success. For an alpha near 1 it lies above k / n.
    """
    if successes == 0:
        return 0.0

    low = 0.0
    high = 1.0
    while low < (middle := (low + high) / 2) < high:
        if upper_tail(successes, trials, middle) <= alpha:
            low = middle
        else:
            high = middle
    return low


@lru_cache(maxsize=4096)
def coin_p_value(count: int, other: int) -> float:
    """The two-sided p-value of so many heads and tails under the hypothesis that the coin is
    fair; 1 without a toss."""
    return min(1.0, 2 * upper_tail(max(count, other), count + other, 0.5))
