"""Several studies as one: what was trained and measured on several machines."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

from ironmoe.attacks.evaluation.describe import differences
from ironmoe.bench.study.ladder.arms import LADDER, Arm
from ironmoe.bench.study.measure.table import all_measurements
from ironmoe.bench.study.numbers.document import Numbers, NumbersError
from ironmoe.bench.study.report.facts import ArmFacts, StudyFacts
from ironmoe.bench.study.statistics.measured import Measured
from ironmoe.bench.study.work.handed_in import is_equal_cost

T = TypeVar("T")
MODELS = "models"  # the entry of settings that names models that were handed in


def joined(files: Sequence[Path], studies: Sequence[Numbers]) -> Numbers:
    """One study of all runs.

    files: of the studies, for messages and for the report.

    Raises:
        NumbersError: two studies have a run in common, or were not made alike: other data, test
            images, trainings, budgets, versions of a measurement, or arms of one name.
    """
    named = list(zip(files, studies, strict=True))
    for (file, study), (other_file, other) in combinations(named, 2):
        _check(file, study, other_file, other)
    _check_runs(files, studies)

    facts = [study.facts for study in studies]
    arms = _first_of_each((each.arm.name, each) for one in facts for each in one.arms)
    ordered = _compared(sorted(arms.values(), key=_place), handed_in=bool(facts[0].handed_in))
    trainings = _first_of_each(item for one in facts for item in one.budgets.items())
    asked = {what.name for one in facts for what in one.measurements}
    every = all_measurements()
    together = facts[0]._replace(
        arms=tuple(ordered),
        budgets=trainings,
        measurements=tuple(what for name, what in every.items() if name in asked),
        not_asked=tuple(name for name in every if name not in asked),
        handed_in=_union(one.handed_in for one in facts),
        notes=_union(one.notes for one in facts),
        problems=_union(one.problems for one in facts),
        training_seconds=sum(one.training_seconds for one in facts),
        measuring_seconds=sum(one.measuring_seconds for one in facts),
        processes=max(one.processes for one in facts),
        command="; ".join(_union([one.command] for one in facts if one.command)),
        settings=facts[0].settings | {MODELS: list(_union(one.handed_in for one in facts))},
        versions={
            name: ", ".join(_union([one.versions.get(name, "unknown")] for one in facts))
            for name in _union(one.versions for one in facts)
        },
        machine="; ".join(_union([one.machine] for one in facts)),
        made=tuple(call for one in facts for call in one.made),
        joined=tuple(str(file) for file in files),
    )
    runs = [run for study in studies for run in study.runs]
    versions = _first_of_each(item for study in studies for item in study.versions.items())
    found = Numbers(together, _in_order(runs, together), versions)
    return found._replace(facts=together._replace(older=tuple(found.older)))


def _in_order(runs: Iterable[Measured], facts: StudyFacts) -> list[Measured]:
    """Seed after seed, as one study has them."""
    trainings, arms = list(facts.budgets), [each.arm.name for each in facts.arms]
    return sorted(
        runs, key=lambda run: (run.seed, trainings.index(run.training), arms.index(run.arm))
    )


def _check(file: Path, study: Numbers, other_file: Path, other: Numbers) -> None:
    one, two = _made(study), _made(other)
    for key in one:  # what follows from other data or trainings would only hide them
        differing = differences(_common(one, two, key), _common(two, one, key), key)
        if differing:
            raise NumbersError(
                f"{file} (“there”) and {other_file} (“now”) do not go together, since they were "
                f"not made alike: {'; '.join(differing)}"
            )


def _made(study: Numbers) -> dict[str, Any]:
    """What two studies must share, as far as both have it."""
    facts = study.facts
    return {
        "data": {
            "name": facts.data,
            "checksum": facts.checksum,
            "classes": facts.classes,
            "test images": facts.test_images,
        },
        "training": {"settings": facts.training},
        "budgets": {name: budget._asdict() for name, budget in facts.budgets.items()},
        "version of measurement": study.versions,
        "arms": {each.arm.name: _described(each, facts) for each in facts.arms},
    }


def _described(each: ArmFacts, facts: StudyFacts) -> dict[str, Any]:
    """An arm with its costs; whether it costs as much as others is another question where models
    were handed in, since it depends on these."""
    cost: dict[str, Any] = {"flops": each.flops, "parameters": each.parameters}
    if facts.handed_in:
        cost["equal_width"] = None
    return each.arm._asdict() | cost


def _compared(arms: list[ArmFacts], *, handed_in: bool) -> list[ArmFacts]:
    """The arms; of handed-in ones anew, whether they cost what the first dense one costs."""
    if not handed_in:
        return arms
    first = next((each for each in arms if each.arm.is_dense), arms[0])
    return [
        each._replace(arm=each.arm._replace(equal_width=not is_equal_cost(each.flops, first.flops)))
        for each in arms
    ]


def _common(one: dict[str, Any], other: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in one[key].items() if name in other[key]}


def _check_runs(files: Sequence[Path], studies: Sequence[Numbers]) -> None:
    seen: dict[tuple[str, str, int], Path] = {}
    for file, study in zip(files, studies, strict=True):
        for run in study.runs:
            name = (run.arm, run.training, run.seed)
            if name in seen:
                raise NumbersError(
                    f"the run {run.arm}, {run.training}, seed {run.seed} must be in one study, got "
                    f"it in {seen[name]} and in {file}"
                )
            seen[name] = file


def _place(each: ArmFacts) -> int:
    """Arms of the ladder have their order; all others keep that in which they first came."""
    known = list(LADDER)
    return known.index(each.arm.name) if _is_of_ladder(each.arm) else len(known)


def _is_of_ladder(arm: Arm) -> bool:
    return LADDER.get(arm.name) == arm


def _first_of_each(items: Iterable[tuple[str, T]]) -> dict[str, T]:
    found: dict[str, T] = {}
    for name, value in items:
        found.setdefault(name, value)
    return found


def _union(lists: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Each text once, in the order in which they first come."""
    return tuple(dict.fromkeys(text for each in lists for text in each))
