"""What was measured and how much, on which machine, and where the numbers are."""

from typing import Any

from ironmoe.bench.common.radii import exact
from ironmoe.bench.study.claims.parts.words import listed
from ironmoe.bench.study.report.arms import Table
from ironmoe.bench.study.report.facts import StudyFacts

IN_255 = ("radii", "radius")  # settings that are in units of 1/255


def measurements_table(facts: StudyFacts) -> Table:
    """A row for each measurement, with the part of each training's budget that it depends on."""
    rows = [
        [
            what.name,
            what.what,
            *(_budget(facts, budget.part(what.settings)) for budget in facts.budgets.values()),
        ]
        for what in facts.measurements
    ]
    headers = ["measurement", "what", *(f"how much: {name}" for name in facts.budgets)]
    return Table("What was measured", headers, rows)


def _budget(facts: StudyFacts, settings: dict[str, Any]) -> str:
    texts = [
        f"{name.replace('_', ' ')} {_text(facts, name, value)}" for name, value in settings.items()
    ]
    return "; ".join(texts) or "all test images"


def _text(facts: StudyFacts, name: str, value: Any) -> str:
    if name.endswith("images"):
        value = min(value, facts.test_images)
    values = value if isinstance(value, tuple) else (value,)
    text = ", ".join(exact(each) for each in values)
    return f"{text} (1/255)" if name in IN_255 else text


def how(facts: StudyFacts) -> list[str]:
    """Sentences about command, machine and files."""
    lines = [f"Command: {facts.command}"] if facts.command else []
    work = f"measurements {_time(facts.measuring_seconds)}"
    if facts.training is not None:
        work = f"trainings {_time(facts.training_seconds)}, {work}"
    packages = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return [
        *lines,
        f"Time of one process, summed over models: {work}; at most {facts.processes} at once.",
        *_where(facts, f"{facts.machine}; {packages}"),
        "What decides a verdict was fixed before anything was measured: the arm with experts "
        "nearest to E = 8 stands for all in comparisons with the dense one, and contrasts have the "
        "roles that the tables name. Primary ones decide, control ones qualify.",
    ]


def _where(facts: StudyFacts, machine: str) -> list[str]:
    """Sentences about the machine, and where the numbers are."""
    numbers = (
        "All numbers of models: report.json, with the numbers of single images that claims and "
        "figures read"
    )
    if facts.joined:
        return [
            *_older(facts),
            f"Put together from {listed(facts.joined)}, whose machines and packages were: "
            f"{machine}. {numbers}; weights, and the numbers of all other images, are in the "
            "folders of these studies.",
        ]
    return [
        f"Machine of this report: {machine}. The file of each measurement in measured/ names the "
        "machine and the versions that it was made with, and has the numbers of all its images.",
        f"{numbers}; models/ has the weights of models that were trained here.",
    ]


def _older(facts: StudyFacts) -> list[str]:
    if not facts.older:
        return []
    return [
        f"{listed(facts.older)}: measured by an earlier version of ironmoe, whose numbers are not "
        "quite what this page says of them."
    ]


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"
