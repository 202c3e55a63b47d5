"""Which of two runs is better, in a sentence."""

from ironmoe.attacks.results.paired import PairedDifference


def which_is_better(
    result: PairedDifference, where: str, names: tuple[str, str] = ("the first run", "the second")
) -> str:
    """Such as "Under pgd at 8/255 the first run is better: 45.0 % against 30.0 %, by 15.0 points
    (95 % interval 5.1 to 24.9, p 0.004)."

    A difference counts as shown if its interval leaves out 0 and its p-value is below one minus the
    confidence of the interval.

    Args:
        where: what the accuracy is about, at the beginning of a sentence: "Without an attack".
        names: of the two runs.
    """
    if not result.images:
        return f"{where} nothing can be said: no image is in both runs."
    low, high = (100 * end for end in result.interval)
    numbers = [100 * result.accuracy_one, 100 * result.accuracy_other]
    confidence = f"{100 * result.confidence:g} % interval"
    p_value = f"p {result.p_value:.2g}"

    if low <= 0 <= high or result.p_value >= 1 - result.confidence:
        return (
            f"{where} no difference is shown between {names[0]}, {numbers[0]:.1f} %, and "
            f"{names[1]}, {numbers[1]:.1f} % ({confidence} of the difference {low:+.1f} to "
            f"{high:+.1f} points, {p_value})."
        )
    better = 0 if result.difference > 0 else 1
    least, most = sorted((abs(low), abs(high)))
    return (
        f"{where} {names[better]} is better than {names[1 - better]}: {numbers[better]:.1f} % "
        f"against {numbers[1 - better]:.1f} %, by {abs(100 * result.difference):.1f} points "
        f"({confidence} {least:.1f} to {most:.1f}, {p_value})."
    )
