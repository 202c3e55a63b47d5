"""All measurements, in the order in which a study makes them. The files that are imported here
register theirs."""

from ironmoe.bench.study.measure import (
    around,
    certificates,
    expert_use,
    interventions,
    local_smoothness,
    paper_attack,
    robust_curve,
    routed_attacks,
    stronger_attacks,
    swaps,
    top_experts,
)
from ironmoe.bench.study.measure.measurement import MEASUREMENTS, Measurement

FILES = (
    robust_curve,
    expert_use,
    local_smoothness,
    top_experts,
    interventions,
    swaps,
    around,
    routed_attacks,
    paper_attack,
    stronger_attacks,
    certificates,
)
"""A new measurement is a file and a line here."""

QUICK = (
    "clean",
    "curve",
    "expert use",
    "derivative",
    "top experts",
    "interventions",
    "swaps",
    "least radius",
)
"""What ``--quick`` measures."""


def all_measurements() -> dict[str, Measurement]:
    """Name → measurement, by the order of FILES."""
    places = {file.__name__: place for place, file in enumerate(FILES)}
    # the order within a file stays: sorted() is stable
    ordered = sorted(MEASUREMENTS.values(), key=lambda each: places[each.measure.__module__])
    return {each.name: each for each in ordered}


def usual_measurements() -> tuple[str, ...]:
    """The names of those that are made if nobody asks for others."""
    return tuple(name for name, what in all_measurements().items() if not what.is_optional)


def chosen(names: tuple[str, ...], *, has_experts: bool) -> tuple[Measurement, ...]:
    """The measurements of these names that suit a model."""
    return tuple(
        what
        for name, what in all_measurements().items()
        if name in names and (has_experts or not what.needs_experts)
    )
