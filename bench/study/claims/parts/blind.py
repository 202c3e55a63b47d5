"""Numbers that tell nothing about models, whatever the truth is."""

from collections.abc import Sequence

from ironmoe.bench.study.claims.parts.evidence import Evidence
from ironmoe.bench.study.claims.parts.outcomes import CLEAN
from ironmoe.bench.study.claims.parts.words import listed
from ironmoe.bench.study.ladder.arms import Arm

AT_AN_END = 0.02  # accuracies this near to 0 or 1
GUESSING = 0.1  # of the way from chance to 1: a model that got no farther learned next to nothing
CLEAN_OF_INTERVENTIONS = "none:clean"
NONE_LEFT = "hardly any image survives the attack in any of these models"
ALL_LEFT = "nearly every image survives the attack in each of these models"
OTHER_RADII = "so that there is nothing to compare: other radii (--eps) would tell more."


def blind(evidence: Evidence, arms: Sequence[Arm], *, outcome: str | None = None) -> str:
    """Why nothing can be told of these arms, in a sentence; "" if something can.

    outcome: the accuracy under attack that would decide, if one would.
    """
    chance = _at_chance(evidence, arms)
    if chance or outcome is None:
        return chance

    means = [evidence.mean(arm, outcome) for arm in arms]
    known = [share for share in means if share is not None]
    if known and max(known) < AT_AN_END:
        return f"At these radii {NONE_LEFT}, {OTHER_RADII}"
    if known and min(known) > 1 - AT_AN_END:
        return f"At these radii {ALL_LEFT}, {OTHER_RADII}"
    return ""


def _at_chance(evidence: Evidence, arms: Sequence[Arm]) -> str:
    most = evidence.chance + GUESSING * (1 - evidence.chance)
    found = [arm.name for arm in arms if _clean(evidence, arm) < most]
    if not found:
        return ""
    return (
        f"The clean accuracy of {listed(found)} is hardly above chance, so other numbers of these "
        "models say nothing of robustness."
    )


def _clean(evidence: Evidence, arm: Arm) -> float:
    for key in (CLEAN, CLEAN_OF_INTERVENTIONS):
        share = evidence.mean(arm, key)
        if share is not None:
            return share
    return 1.0  # not measured
