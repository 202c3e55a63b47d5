"""Which of two runs is better, in a sentence."""

from ironmoe.attacks.results.paired import PairedDifference

Ends = tuple[tuple[float, float], tuple[float, float]]


def which_is_better(
    result: PairedDifference,
    where: str,
    names: tuple[str, str] = ("the first run", "the second"),
    ends: Ends | None = None,
) -> str:
    """Such as "Under pgd at 8/255 the first run is better than the second: 45.0 % against 30.0 %
    (95 % interval of the difference 5.1 to 24.9 points, p 0.004)."

    A difference counts as shown if its interval leaves out 0 and its p-value is below one minus the
    confidence of the interval.

    Args:
        where: what the accuracy is about, at the beginning of a sentence: "Without an attack".
        names: of the two runs.
        ends: of each run the smallest and the largest accuracy that are possible, where images are
            undecided.
    """
    if not result.images:
        return f"{where} nothing can be said: no image is in both runs."
    low, high = (100 * end for end in result.interval)
    known = (result.accuracy_one,) * 2, (result.accuracy_other,) * 2
    told = [from_to(*each) for each in (ends or known)]
    confidence = f"{100 * result.confidence:g} % interval"
    p_value = f"p {result.p_value:.2g}"

    if low <= 0 <= high or result.p_value >= 1 - result.confidence:
        return (
            f"{where} no difference is shown between {names[0]}, {told[0]}, and "
            f"{names[1]}, {told[1]} ({confidence} of the difference {low:+.1f} to "
            f"{high:+.1f} points, {p_value})."
        )
    better = 0 if result.difference > 0 else 1
    least, most = sorted((abs(low), abs(high)))
    return (
        f"{where} {names[better]} is better than {names[1 - better]}: {told[better]} against "
        f"{told[1 - better]} ({confidence} of the difference {least:.1f} to {most:.1f} points, "
        f"{p_value})."
    )


def from_to(least: float, most: float) -> str:
    """A share in percent, or the range of it: "45.0 %", "30.0 to 45.0 %"."""
    return f"{100 * most:.1f} %" if least == most else f"{100 * least:.1f} to {100 * most:.1f} %"
