"""``report.json``: the facts of a study, its runs and its verdicts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.study.claims.parts.verdict import Verdict, as_entry
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.table import all_measurements
from ironmoe.bench.study.numbers.columns import as_columns, as_rows
from ironmoe.bench.study.report.facts import ArmFacts, StudyFacts
from ironmoe.bench.study.statistics.measured import Measured

LISTS = ("not_asked", "handed_in", "notes", "problems", "joined", "older", "made")
"""Facts that are tuples, which JSON does not have."""
FORMAT = "numbers of ironmoe study, 1"


class NumbersError(UserError):
    """A file is not the ``report.json`` of a study, or does not go together with another one."""


class Numbers(NamedTuple):
    """What a study found. facts: how; runs: every model; versions: measurement → the version that
    the numbers are of."""

    facts: StudyFacts
    runs: list[Measured]
    versions: dict[str, int]

    @property
    def older(self) -> dict[str, int]:
        """The versions that are not today's."""
        today = todays_versions(self.facts)
        return {name: version for name, version in self.versions.items() if version != today[name]}


def todays_versions(facts: StudyFacts) -> dict[str, int]:
    """Of the measurements that were asked for."""
    return {what.name: what.version for what in facts.measurements}


def as_document(numbers: Numbers, found: Sequence[Verdict]) -> dict[str, Any]:
    """For JSON: all facts; the runs, as ``as_columns`` has them; the verdicts."""
    facts = numbers.facts
    return {
        "format": FORMAT,
        **facts._asdict(),
        "budgets": {training: budget._asdict() for training, budget in facts.budgets.items()},
        "measurements": numbers.versions,
        "arms": [
            each.arm._asdict() | {"flops": each.flops, "parameters": each.parameters}
            for each in facts.arms
        ],
        "verdicts": [as_entry(verdict) for verdict in found],
        **as_columns(numbers.runs),
    }


def read_numbers(file: Path) -> Numbers:
    """The numbers in a ``report.json``; its verdicts are not read, since they follow from them.

    Raises:
        NumbersError: the file cannot be read, or is none; the message says why.
    """
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _no_numbers(file, f"cannot be read: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _no_numbers(file, f"has no entry “format” that is “{FORMAT}”")

    try:
        versions = dict(document["measurements"])
        unknown = sorted(set(versions) - set(all_measurements()))
        if unknown:
            raise _no_numbers(file, f"has measurements that this version does not know: {unknown}")
        numbers = Numbers(_facts(document), as_rows(document), versions)
        _check_runs(numbers)
        return numbers
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _no_numbers(file, f"is damaged: {error!r}") from None


def _check_runs(numbers: Numbers) -> None:
    arms = {each.arm.name for each in numbers.facts.arms}
    for run in numbers.runs:
        if run.arm not in arms or run.training not in numbers.facts.budgets:
            raise ValueError(f"a run of {run.arm}, {run.training}, that nothing is said of")


def _facts(document: dict[str, Any]) -> StudyFacts:
    document = {"made": [], **document}  # files of earlier versions have none
    known = {name: document[name] for name in StudyFacts._fields}
    if not isinstance(known["settings"], dict) or not isinstance(known["versions"], dict):
        raise TypeError("settings and versions must be objects")
    return StudyFacts(
        **known
        | {
            "arms": tuple(_arm(entry) for entry in document["arms"]),
            "budgets": {
                training: Budget(**entry | {"radii": tuple(entry["radii"])})
                for training, entry in document["budgets"].items()
            },
            "measurements": tuple(
                what for name, what in all_measurements().items() if name in known["measurements"]
            ),
        }
        | {name: tuple(known[name]) for name in LISTS}
    )


def _arm(entry: dict[str, Any]) -> ArmFacts:
    arm = {name: value for name, value in entry.items() if name not in ("flops", "parameters")}
    return ArmFacts(Arm(**arm), entry["flops"], entry["parameters"])


def _no_numbers(file: Path, why: str) -> NumbersError:
    return NumbersError(f"--from must be the report.json of a study, but {file} {why}")
