"""A ladder of arms as one contrast: what an outcome gains from its first arm to its last."""

from collections.abc import Sequence
from math import log2
from typing import NamedTuple

from ironmoe.bench.study.claims.parts.contrast import Contrast
from ironmoe.bench.study.claims.parts.evidence import Evidence
from ironmoe.bench.study.claims.parts.ladders import expert_ladder
from ironmoe.bench.study.claims.parts.outcomes import title, unit_of
from ironmoe.bench.study.claims.parts.verdict import Role
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.statistics.trend import trend


class Ladder(NamedTuple):
    """arms: at least two, in the order of their numbers; numbers: where each stands, such as its E,
    more than 0 and different; symbol: what these are, "E" or "K"; setting: what all arms share."""

    arms: Sequence[Arm]
    numbers: Sequence[int]
    symbol: str
    setting: str


GATES = {False: "the gates of the source", True: "gates that sum to 1"}
"""By ``Arm.renormalize``."""


def ladder_over_experts(evidence: Evidence, key: str, *, renormalize: bool) -> Ladder:
    """The arms at equal FLOPs that differ in E, of which the outcome was measured."""
    declared = expert_ladder(evidence.arms, renormalize=renormalize)
    arms = [arm for arm in declared if evidence.by_seed(arm, key, unit_of(key))]
    return Ladder(arms, [arm.experts for arm in arms], "E", GATES[renormalize])


def slope_contrast(evidence: Evidence, key: str, ladder: Ladder, role: Role) -> Contrast | None:
    """The straight line in log₂ of the ladder's numbers, as the difference between its two ends.

    Over the seeds that all arms have; None where there is none, or fewer than two arms.
    """
    unit = unit_of(key)
    outcomes = [evidence.by_seed(arm, key, unit) for arm in ladder.arms]
    seeds = sorted(set.intersection(*map(set, outcomes))) if len(outcomes) > 1 else []
    if not seeds:
        return None

    x = [log2(number) for number in ladder.numbers]
    found = trend([[outcome[seed] for outcome in outcomes] for seed in seeds], x)
    span = x[-1] - x[0]
    by_seed = {seed: slope * span for seed, slope in zip(seeds, found.slopes, strict=True)}

    numbers = ", ".join(map(str, ladder.numbers))
    label = f"{title(key)} along {ladder.symbol} = {numbers}, {ladder.setting}"
    return Contrast(label, role, unit, by_seed, ladder.setting, found.permutation)
