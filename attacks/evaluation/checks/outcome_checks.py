"""Checks against false security: signs in what the attacks did (Croce & Hein, arXiv 2003.01690;
Pintor et al., arXiv 2106.09947)."""

from ironmoe.attacks.engine.counters import LOSS_RISING
from ironmoe.attacks.evaluation.report import AttackSummary, Flag, RobustnessReport

# Square may break this share of all images beyond those that the gradient attacks broke.
SQUARE_GAIN = 0.002
# The loss may still have been rising on this share of the images that held.
RISING_SHARE = 0.1


def check_outcome(report: RobustnessReport) -> list[Flag]:
    """Look at what the attacks did."""
    return [_square(report), _rising(report)]


def _square(report: RobustnessReport) -> Flag:
    """Whether random search found what gradients had not."""
    name = "Square beats the gradient attacks"
    gains = [_gain_of_square(summary, report) for summary in report.attacks.values()]
    known = [gain for gain in gains if gain is not None]
    if not known:
        return Flag(
            name, False, 0.0, "Not looked at: Square was not run beside attacks that use gradients."
        )

    gain = max(known)
    tripped = gain > SQUARE_GAIN
    return Flag(
        name,
        tripped,
        gain,
        f"Square, which uses no gradients, broke {100 * gain:.1f} % of the images that gradient "
        "attacks had left. "
        + (
            "Gradients may be masked: trust neither number, and try an adaptive attack."
            if tripped
            else "As it should be."
        ),
    )


def _gain_of_square(summary: AttackSummary, report: RobustnessReport) -> float | None:
    """The share of the images that Square broke and gradient attacks had left; None for an attack
    without Square, or with nothing to compare it with."""
    total = max(len(summary.fell), 1)
    is_square = [_is_square(stage) for _, stage in summary.stages]

    if all(is_square):
        others = [
            other
            for other in report.attacks.values()
            if not any(_is_square(stage) for _, stage in other.stages)
        ]
        broken = [float((o.robust & o.decided & ~summary.robust).sum()) for o in others]
        return min(broken) / total if others else None

    if any(is_square):
        broken_by_square = [n for stage, n in summary.fell_to.items() if _is_square(stage)]
        return sum(broken_by_square) / total
    return None


def _is_square(stage: str) -> bool:
    return "square" in stage.lower()


def _rising(report: RobustnessReport) -> Flag:
    """Whether more steps would have found more."""
    name = "loss still rising at the end"
    held = [summary.robust & summary.decided for summary in report.attacks.values()]
    if not any(bool(held_by_one.any()) for held_by_one in held):
        return Flag(
            name, False, 0.0, "Not looked at: no attack ran to its end on an image that held."
        )

    rising = [summary.flags[LOSS_RISING] for summary in report.attacks.values()]
    share = max(
        float((up & kept).sum()) / max(int(kept.sum()), 1)
        for up, kept in zip(rising, held, strict=True)
    )

    tripped = share > RISING_SHARE
    return Flag(
        name,
        tripped,
        share,
        f"For {100 * share:.0f} % of the images that held, an attempt gained more than a "
        "twentieth of its loss in its last tenth. "
        + ("More steps would find more." if tripped else "More steps would change little."),
    )
