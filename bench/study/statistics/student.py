"""Student's t test of a mean over runs against a number."""

from scipy import special


def p_above(mean: float, sd: float, runs: int, *, bound: float = 0.0) -> float:
    """The one-sided p-value of the hypothesis that the true mean is at most ``bound``.

    Args:
        mean, sd: of the runs, sd with n − 1. Where it is 0 the p-value is 0 or 1.
        runs: at least 2.

    Raises:
        ValueError: fewer runs.
    """
    if runs < 2:
        raise ValueError(f"runs must be at least 2, got {runs}")
    if sd == 0:
        return 0.0 if mean > bound else 1.0
    return float(special.stdtr(runs - 1, -(mean - bound) / sd * runs**0.5))


def p_below(mean: float, sd: float, runs: int, *, bound: float = 0.0) -> float:
    """The one-sided p-value of the hypothesis that the true mean is at least ``bound``; else as
    ``p_above``."""
    return p_above(-mean, sd, runs, bound=-bound)


def p_two_sided(mean: float, sd: float, runs: int) -> float:
    """The two-sided p-value of the hypothesis that the true mean is 0; else as ``p_above``."""
    return min(1.0, 2 * p_above(abs(mean), sd, runs))
