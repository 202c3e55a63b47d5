"""Checks against false security: signs in what the attacks did (Croce & Hein, arXiv 2003.01690;
Pintor et al., arXiv 2106.09947)."""

from ironmoe.attacks.evaluation.report import Flag, RobustnessReport

SQUARE_GAIN, RISING_SHARE = 0.002, 0.1


def check_outcome(report: RobustnessReport) -> list[Flag]:
    """Look at what the attacks did."""
    return [_square(report), _rising(report)]


def _square(report: RobustnessReport) -> Flag:
    name, gains = "Square beats the gradient attacks", []
    for summary in report.attacks.values():
        total = max(len(summary.fell), 1)
        square = [_is_square(stage) for _, stage in summary.stages]
        others = [
            s
            for s in report.attacks.values()
            if not any(_is_square(stage) for _, stage in s.stages)
        ]
        if all(square) and others:
            gains.append(
                min(float((s.robust & s.decided & ~summary.robust).sum()) for s in others) / total
            )
        elif any(square) and not all(square):
            gains.append(
                sum(n for stage, n in summary.fell_to.items() if _is_square(stage)) / total
            )
    if not gains:
        return Flag(
            name, False, 0.0, "Not looked at: Square was not run beside attacks that use gradients."
        )
    gain = max(gains)
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


def _is_square(stage: str) -> bool:
    return "square" in stage.lower()


def _rising(report: RobustnessReport) -> Flag:
    name, held = (
        "loss still rising at the end",
        [summary.robust & summary.decided for summary in report.attacks.values()],
    )
    if not any(bool(held_by_one.any()) for held_by_one in held):
        return Flag(
            name, False, 0.0, "Not looked at: no attack ran to its end on an image that held."
        )
    rising = [summary.flags["loss_rising"] for summary in report.attacks.values()]
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
