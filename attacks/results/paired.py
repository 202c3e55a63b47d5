"""A test and an interval for the difference of two means over the same images."""

from collections.abc import Sequence
from itertools import product
from math import erfc, sqrt
from statistics import NormalDist
from typing import Any, NamedTuple

MCNEMAR = "McNemar's exact test"
SIGN_FLIPS = "exact sign-flip test"
MANY_SIGN_FLIPS = "sign-flip test, normal approximation"
MOST_ENUMERATED = 16  # differences whose signs are all tried: 65,536 ways


class Counts(NamedTuple):
    """How many images are right in both runs, in the first only, in the second only, in none."""

    both: int
    only_one: int
    only_other: int
    neither: int


class PairedDifference(NamedTuple):
    """Two accuracies on the same images.

    images: how many
    counts: how many are right in which run; None where some values lie between 0 and 1
    accuracy_one, accuracy_other: NaN without images
    difference: accuracy_one − accuracy_other
    interval: of the difference, at ``confidence``
    p_value: two-sided, of the hypothesis that both are equally good
    test: the name of the test that it comes from
    """

    images: int
    counts: Counts | None
    accuracy_one: float
    accuracy_other: float
    difference: float
    interval: tuple[float, float]
    confidence: float
    p_value: float
    test: str

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        numbers = self._asdict() | {"interval": list(self.interval)}
        counts = numbers.pop("counts")
        return numbers | (dict.fromkeys(Counts._fields) if counts is None else counts._asdict())


def paired_difference(
    one: Sequence[float], other: Sequence[float], *, confidence: float = 0.95
) -> PairedDifference:
    """Compare two accuracies on the same images.

    Where values are 0 and 1, the p-value is that of McNemar's exact test (McNemar 1947; the
    binomial test of the images that are right in one run only). Else it is that of the sign-flip
    test of Fisher (1935) and Pitman (1937), which is the same test for any differences: under the
    hypothesis each image's difference has either sign with probability 1/2. All signs are tried
    for up to 16 images that differ; for more, their sum is taken to be normal.

    The interval is that of Bonett and Price (2012, J. Educ. Behav. Stat. 37, 479–488), which
    Fagerland, Lydersen and Laake (2014, Stat. Med. 33, 2850–2875) recommend: Wald's interval of the
    mean difference after one image is added that is right in the first run only, and one that is
    right in the second only. Where values lie between 0 and 1, these two differ as much as the
    image that differs most.

    Args:
        one, other: (N,) values in [0, 1], of the same images in the same order: 1 the image is
            right, 0 it is not, or how often it is right. Lists, or tensors on CPU.
        confidence: that of the interval, between 0 and 1.

    Raises:
        ValueError: two lengths, values outside [0, 1], or another confidence.
    """
    first, second = _checked(one, "one"), _checked(other, "other")
    if len(first) != len(second):
        raise ValueError(
            f"one and other must have the same length, got {len(first)} and {len(second)}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")

    count = len(first)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    p_value, test = _tested(differences)
    means = [sum(values) / count if count else float("nan") for values in (first, second)]

    return PairedDifference(
        images=count,
        counts=_counts(first, second),
        accuracy_one=means[0],
        accuracy_other=means[1],
        difference=means[0] - means[1],
        interval=_interval(differences, confidence),
        confidence=confidence,
        p_value=p_value,
        test=test,
    )


def mcnemar(only_one: int, only_other: int) -> float:
    """The two-sided p-value of McNemar's exact test: of the binomial test of ``only_one`` successes
    in ``only_one + only_other`` trials of probability 1/2."""
    trials = only_one + only_other
    fewer = min(only_one, only_other)

    tail = ways = 1
    for successes in range(fewer):
        ways = ways * (trials - successes) // (successes + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**trials)


def _checked(values: Sequence[float], name: str) -> list[float]:
    numbers = [float(value) for value in values]
    outside = [number for number in numbers if not 0 <= number <= 1]
    if outside:
        raise ValueError(f"{name} must hold values from 0 to 1, got {outside[0]}")
    return numbers


def _counts(one: Sequence[float], other: Sequence[float]) -> Counts | None:
    pairs = list(zip(one, other, strict=True))
    counts = Counts(*(pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))))
    return counts if sum(counts) == len(pairs) else None


def _tested(differences: Sequence[float]) -> tuple[float, str]:
    """(p-value, name of the test)."""
    moved = [difference for difference in differences if difference]
    if all(abs(difference) == 1 for difference in moved):
        only_one = sum(difference > 0 for difference in moved)
        return mcnemar(only_one, len(moved) - only_one), MCNEMAR

    seen = abs(sum(moved))
    if len(moved) <= MOST_ENUMERATED:
        least = seen - 1e-9 * sum(map(abs, moved))  # equal sums may be rounded differently
        sums = [
            abs(sum(sign * difference for sign, difference in zip(signs, moved, strict=True)))
            for signs in product((1, -1), repeat=len(moved))
        ]
        return sum(each >= least for each in sums) / len(sums), SIGN_FLIPS
    deviation = sqrt(sum(difference**2 for difference in moved))
    return erfc(seen / deviation / sqrt(2)), MANY_SIGN_FLIPS


def _interval(differences: Sequence[float], confidence: float) -> tuple[float, float]:
    """Bonett and Price's, of the mean difference."""
    most = max(map(abs, differences), default=0.0) or 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    count = len(differences) + 2
    mean = sum(differences) / count
    squares = sum(difference**2 for difference in differences) + 2 * most**2
    half = z * sqrt((squares / count - mean**2) / count)
    return max(-1.0, mean - half), min(1.0, mean + half)
