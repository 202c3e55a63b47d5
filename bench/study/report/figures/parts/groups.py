"""Which arms stand together in a panel."""

from collections.abc import Sequence
from typing import NamedTuple

from ironmoe.bench.study.claims.parts.ladders import (
    deciding_arm,
    dense_arm,
    expert_ladder,
    reference_arm,
)
from ironmoe.bench.study.ladder.arms import Arm

GATES = {False: "gates of the source", True: "gates that sum to 1"}
"""By ``Arm.renormalize``."""


class Group(NamedTuple):
    """title: what its arms with experts share; arms: the dense one first, if there is one."""

    title: str
    arms: list[Arm]


def at_equal_cost(arms: Sequence[Arm]) -> list[Group]:
    """The arms at equal FLOPs: a ladder of E for each kind of gates, and what is in neither, each
    with the dense arm beside it. Without any, the arms that there are."""
    dense = [arm for arm in [dense_arm(arms)] if arm is not None]
    groups = []
    for renormalize, title in GATES.items():
        ladder = expert_ladder(arms, renormalize=renormalize)
        # An arm whose tokens take all experts is in both ladders, and alone it makes none.
        if any(arm.renormalize == renormalize for arm in ladder):
            groups.append(Group(title, dense + ladder))

    placed = {arm for group in groups for arm in group.arms} | set(dense)
    others = [arm for arm in arms if arm not in placed and not arm.equal_width]
    if others:
        groups.append(Group("other arms", dense + others))
    if not groups and len(arms) > len(dense):
        return [Group("at other cost", [*dense, *(arm for arm in arms if not arm.is_dense)])]
    return groups or [Group("dense", dense)]


def on_ladders(arms: Sequence[Arm]) -> list[Arm]:
    """The arms that a figure over E shows: the dense one and the ladders, in the order of arms."""
    shown = {dense_arm(arms)}
    for renormalize in GATES:
        shown |= set(expert_ladder(arms, renormalize=renormalize))
    return [arm for arm in arms if arm in shown]


def few(arms: Sequence[Arm]) -> list[Arm]:
    """Up to three arms with experts: the reference arm, its twin with the other gates, and the arm
    with the most experts. They are chosen by what they are, not by what was measured."""
    source = expert_ladder(arms, renormalize=False)
    renormalized = expert_ladder(arms, renormalize=True)
    arm = deciding_arm(arms, at_any_cost=True)
    if arm is None:
        return []
    chosen = [arm, reference_arm(arms, renormalize=True), *(source or renormalized)[-1:]]
    return list(dict.fromkeys(each for each in chosen if each is not None))
