"""``ironmoe study``: do what is left, then say what it shows."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ironmoe.bench.common.run_folder import RunFolder, default_folder
from ironmoe.bench.study.claims.parts.outcomes import LEAST_EPS, MARGIN, TOP_DISTANCE
from ironmoe.bench.study.claims.parts.verdict import Verdict, as_entry
from ironmoe.bench.study.claims.table import verdicts
from ironmoe.bench.study.options import StudyOptions
from ironmoe.bench.study.report.facts import StudyFacts
from ironmoe.bench.study.report.figures.table import FIGURES
from ironmoe.bench.study.report.gather import study_facts
from ironmoe.bench.study.report.page import write_study_report
from ironmoe.bench.study.statistics.measured import Measured
from ironmoe.bench.study.work.collected import collected
from ironmoe.bench.study.work.display import StudyDisplay
from ironmoe.bench.study.work.plan import announcement, make_plan
from ironmoe.bench.study.work.processes import work
from ironmoe.bench.study.work.tasks import Study, one_thread

BYTES_OF_MODEL = 20_000_000  # weights, and the state while it is trained
OF_IMAGES = (LEAST_EPS, TOP_DISTANCE, MARGIN)
"""Numbers of single images that a claim reads."""


def run_study(options: StudyOptions, console: Console, *, only_plan: bool = False) -> Path:
    """Train and measure what is not there yet, and write what it shows.

    only_plan: say how long it will take, and do nothing.

    Returns:
        The folder of the study.
    """
    path = options.out or default_folder("study", options.settings)
    folder = RunFolder(path, options.settings, BYTES_OF_MODEL * options.processes)
    with one_thread():
        study = Study(options, path)
        console.print(folder.greeting, highlight=False, markup=False, soft_wrap=True)
        plan = make_plan(study)
        console.print(announcement(study, plan), highlight=False, markup=False, soft_wrap=True)
        if only_plan:
            return path
        if plan.left:
            with StudyDisplay(console, study.tasks, plan) as tell:
                work(study, tell)

    kept = collected(study.tasks, study.store)
    found = verdicts(kept.runs, study.arms)
    _print(found, console)
    facts = study_facts(study, kept, command=" ".join(["ironmoe", *sys.argv[1:]]))
    folder.write("report.json", _numbers(facts, kept.runs, found))
    write_study_report(path, facts, kept.runs, found, study.arms, figures=FIGURES)
    console.print(f"\n{folder.farewell}", highlight=False, markup=False, soft_wrap=True)
    return path


def _numbers(facts: StudyFacts, runs: list[Measured], found: list[Verdict]) -> dict[str, Any]:
    """What report.json holds: everything but the numbers of single images that no claim reads,
    which are in the folder ``measured``."""
    return {
        "settings": facts.settings,
        "budgets": {training: budget._asdict() for training, budget in facts.budgets.items()},
        "command": facts.command,
        "machine": facts.machine,
        "versions": facts.versions,
        "training_seconds": facts.training_seconds,
        "measuring_seconds": facts.measuring_seconds,
        "arms": [
            each.arm._asdict() | {"flops": each.flops, "parameters": each.parameters}
            for each in facts.arms
        ],
        "verdicts": [as_entry(verdict) for verdict in found],
        "runs": [_run(run) for run in runs],
        "notes": list(facts.notes),
        "problems": list(facts.problems),
    }


def _run(run: Measured) -> dict[str, Any]:
    """The numbers of one model, with six digits."""
    rows = {name: run.images[name] for name in OF_IMAGES if name in run.images}
    images = min(map(len, rows.values()), default=0)
    return run._asdict() | {
        "values": {name: _short(value) for name, value in run.values.items()},
        "images": {name: [_short(value) for value in row[:images]] for name, row in rows.items()},
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _print(found: list[Verdict], console: Console) -> None:
    """The verdicts on the terminal, one claim after another."""
    for verdict in found:
        console.print(
            f"\n{verdict.training}: {verdict.sentence}",
            highlight=False,
            markup=False,
            style="bold",
            soft_wrap=True,
        )
        words = f"{verdict.verdict.upper()}. {verdict.words}"
        console.print(words, highlight=False, markup=False, soft_wrap=True)
