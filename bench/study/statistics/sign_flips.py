"""The sign-flip test: what a mean of differences would be if each had either sign."""

from collections.abc import Sequence

from ironmoe.bench.study.statistics.permutation import Permutation, permutation_test


def sign_flips(differences: Sequence[float], *, draws: int = 9_999, seed: int = 0) -> Permutation:
    """Test that paired differences lie around 0 (Fisher 1935; Pitman 1937).

    Two architectures that are one and the same could have changed places in any pair, which flips
    the sign of its difference. All signs are tried for up to 16 pairs. With S pairs no p-value can
    be less than 2 / 2^S: with fewer than 6 the test cannot reach 5 %, whatever the differences are.

    Args:
        differences: one a pair, at least one.
        draws, seed: of signs, for more than 16 pairs.

    Raises:
        ValueError: no difference.
    """
    pairs = [((-0.5, 0.5), (0.0, float(difference))) for difference in differences]
    if not pairs:
        raise ValueError("differences must be at least one, got none")
    return permutation_test(pairs, draws=draws, seed=seed)
