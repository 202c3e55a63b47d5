"""What several claims share: the arms with experts against the dense one, in one outcome."""

from typing import NamedTuple

from ironmoe.bench.study.claims.parts.contrast import Contrast, effect
from ironmoe.bench.study.claims.parts.evidence import Evidence
from ironmoe.bench.study.claims.parts.ladders import (
    deciding_arm,
    dense_arm,
    twin_arm,
    without_experts,
)
from ironmoe.bench.study.claims.parts.outcomes import title, unit_of
from ironmoe.bench.study.claims.parts.verdict import Effect, Role
from ironmoe.bench.study.ladder.arms import Arm


class AgainstDense(NamedTuple):
    """reference, dense: the arms of ``primary``; primary: None where it was not measured, and
    ``missing`` says what; control: the reference with gates that sum to 1; others: the remaining
    arms; left_out: seeds that only one of the two arms has."""

    reference: Arm | None
    dense: Arm | None
    primary: Contrast | None
    control: Effect | None
    others: list[Effect]
    missing: list[str]
    left_out: list[int]


def against_dense(evidence: Evidence, key: str) -> AgainstDense:
    """Every arm with experts at equal FLOPs minus the dense one. The reference arm decides: it is
    chosen by its number of experts, before anything is measured."""
    dense = dense_arm(evidence.arms)
    reference = deciding_arm(evidence.arms)
    if dense is None or reference is None:
        missing = ["a dense arm"] * (dense is None)
        missing += [without_experts(evidence.arms)] * (reference is None)
        return AgainstDense(reference, dense, None, None, [], missing, [])

    unit = unit_of(key)
    by_seed = evidence.differences(key, unit, reference, dense)
    missing = _missing(evidence, key, (reference, dense)) if not by_seed else []
    label = contrast_label(key, reference, dense)
    primary = Contrast(label, "primary", unit, by_seed) if by_seed else None
    left_out = evidence.seeds((reference, dense)) - by_seed.keys()

    twin = twin_arm(evidence.arms, reference)
    others = [
        arm
        for arm in evidence.arms
        if not arm.is_dense and not arm.equal_width and arm not in (reference, twin)
    ]
    control = difference(evidence, key, twin, dense, "control")
    rows = [difference(evidence, key, arm, dense, "secondary") for arm in others]
    measured = [row for row in rows if row is not None]
    return AgainstDense(reference, dense, primary, control, measured, missing, sorted(left_out))


def difference(
    evidence: Evidence, key: str, one: Arm | None, other: Arm, role: Role
) -> Effect | None:
    """``one`` − ``other`` where both were measured."""
    if one is None:
        return None
    by_seed = evidence.differences(key, unit_of(key), one, other)
    if not by_seed:
        return None
    return effect(Contrast(contrast_label(key, one, other), role, unit_of(key), by_seed))


def contrast_label(key: str, one: Arm, other: Arm) -> str:
    """For a table."""
    return f"{title(key)}: {one.name} − {other.name}"


def _missing(evidence: Evidence, key: str, arms: tuple[Arm, ...]) -> list[str]:
    lacking = [
        evidence.lacking(arm, key) for arm in arms if not evidence.by_seed(arm, key, unit_of(key))
    ]
    names = " and ".join(arm.name for arm in arms)
    return lacking or [f"{key} of {names} with a common seed"]
