"""Why an attack cannot have found anything, whatever the model is."""

from collections.abc import Mapping

from ironmoe.attacks.evaluation.findings.summary import AttackSummary

AT_THEIR_TARGET = (
    "the model classifies them as their labels without any attack. Under targeted=True labels are "
    "the classes to reach, not the true ones"
)
ALL_WRONG = (
    "the model is wrong about all of them. Look at the labels, at what the model expects "
    "(normalize=, bounds=), and at the settings of the goal"
)


def why_nothing(summary: AttackSummary) -> str | None:
    """Why not a single image was attacked; None if one was."""
    counted = ~summary.skipped
    right = summary.clean_correct & counted
    if not len(counted):
        return "the budget ended before one was read"
    if not bool(counted.any()):
        return "all were skipped: nothing finite came of them"
    if not bool(right.any()):
        return AT_THEIR_TARGET if summary.targeted else ALL_WRONG

    forwards = summary.per_image.get("forwards", right.long() * (summary.passes + 1))
    began = summary.decided | (forwards > summary.passes)
    return None if bool((began & right).any()) else "the budget ended before an attack began"


def why_still(summary: AttackSummary) -> str | None:
    """Why an attack could not move an image; None if it could."""
    if summary.still:
        return (
            f"it may not change an image at all: eps is {summary.eps[-1]:.6g}, which is 0 or less "
            "than a step of levels="
        )
    return None if summary.takes_steps else "it takes no step, or steps of length 0"


def idle_attacks(attacks: Mapping[str, AttackSummary]) -> dict[str, str]:
    """Attack → why it can have found nothing, of those for which this is so."""
    reasons = {name: why_nothing(each) or why_still(each) for name, each in attacks.items()}
    return {name: reason for name, reason in reasons.items() if reason}
