"""Whether a mean over runs can be told from all that lies beyond a margin."""

from ironmoe.bench.study.statistics.student import p_above, p_below


def tost(mean: float, sd: float, runs: int, *, margin: float) -> float:
    """The p-value of the hypothesis that the true mean lies at or beyond −margin or margin.

    Two one-sided t tests (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15, 657–680); both have to
    reject, so the larger p-value counts. If it is at most 5 %, the 90 % t interval lies within the
    margin: there is no difference of more than that.

    Args:
        mean, sd: of paired differences, sd with n − 1.
        runs: how many pairs, at least 2.
        margin: more than 0, in the unit of the mean.

    Raises:
        ValueError: fewer runs, or another margin.
    """
    return max(
        p_above(mean, sd, runs, bound=-_checked(margin)), p_below(mean, sd, runs, bound=margin)
    )


def beyond(mean: float, sd: float, runs: int, *, margin: float) -> float:
    """The two-sided p-value of the hypothesis that the true mean lies within −margin … margin, both
    included; else as ``tost``."""
    nearer = min(
        p_above(mean, sd, runs, bound=_checked(margin)), p_below(mean, sd, runs, bound=-margin)
    )
    return min(1.0, 2 * nearer)


def _checked(margin: float) -> float:
    if not margin > 0:
        raise ValueError(f"margin must be more than 0, got {margin}")
    return margin
