"""``ironmoe study``: do what is left, then say what it shows."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ironmoe.bench.common.files import write_json_lines
from ironmoe.bench.common.run_folder import RunFolder, default_folder, sessions_of
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.claims.parts.verdict import Verdict
from ironmoe.bench.study.claims.table import verdicts
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.numbers.document import (
    Numbers,
    as_document,
    read_numbers,
    todays_versions,
)
from ironmoe.bench.study.numbers.joined import joined
from ironmoe.bench.study.options import StudyOptions
from ironmoe.bench.study.report.figures.table import FIGURES
from ironmoe.bench.study.report.gather import study_facts
from ironmoe.bench.study.report.page import write_study_report
from ironmoe.bench.study.work.collected import collected
from ironmoe.bench.study.work.display import StudyDisplay
from ironmoe.bench.study.work.group import work_group
from ironmoe.bench.study.work.plan import announcement, make_plan
from ironmoe.bench.study.work.processes import work
from ironmoe.bench.study.work.tasks import Study, one_thread

BYTES_OF_MODEL = 20_000_000  # weights, and the state while it is trained
BYTES_OF_REPORT = 20_000_000
LINES = 2  # levels of report.json whose entries have lines of their own


def run_study(options: StudyOptions, console: Console, *, only_plan: bool = False) -> Path:
    """Train and measure what is not there yet, and write what it shows.

    Under ``torchrun`` each group of ``options.expert_parallel`` processes is one worker, and the
    first process of all prints and reports.

    only_plan: say how long it will take, and do nothing.

    Returns:
        The folder of the study.
    """
    path = options.out or default_folder("study", options.settings)
    with one_thread(), work_group(options.expert_parallel) as group:
        if group.store is not None:
            options = replace(options, processes=group.groups)
        study = Study(options, path)
        if not group.is_first_of_all:
            if not only_plan and group.begins():
                study.worker(group).run(study.tasks, group.leave)
            return path

        if only_plan and not path.exists():
            _say(f"Nothing is written; without --plan it would be to {path}/", console)
            _say(announcement(study, make_plan(study)), console)
            return path

        ranks = options.expert_parallel  # of each of the processes that take models
        parallel = {"processes": ranks * options.processes, "expert_parallel": ranks}
        needed = BYTES_OF_MODEL * options.processes
        folder = RunFolder(path, options.settings, needed, parallel=parallel)
        _say(folder.greeting, console)
        plan = make_plan(study)
        _say(announcement(study, plan), console)
        if only_plan:
            return path
        group.begin(is_work_left=bool(plan.left))
        if plan.left:
            folder.worked()
            with StudyDisplay(console, study.tasks, plan) as tell:
                work(study, group, tell)

    kept = collected(study.tasks, study.store, study.images)
    facts = study_facts(study, kept, command=_command(), sessions=sessions_of(path))
    left_out = _runs_of(folder.read("report.json")) - {run[:3] for run in kept.runs}
    _report(folder, Numbers(facts, kept.runs, todays_versions(facts)), study.arms, console)
    if left_out:
        _say(
            f"The report that was here had {counted(len(left_out), 'model')} more. What was "
            "measured of them is kept: ask for their arms, trainings and seeds, too.",
            console,
        )
    return path


def _runs_of(document: Any) -> set[tuple[str, str, int]]:
    """(arm, training, seed) of the models in a ``report.json``; none where it is not one."""
    try:
        return {(run["arm"], run["training"], run["seed"]) for run in document["runs"]}
    except (KeyError, TypeError):
        return set()


def join_studies(files: Sequence[Path], out: Path | None, console: Console) -> Path:
    """Put the numbers of studies together and write what they show. Nothing is trained or measured.

    files: the ``report.json`` of each, or its folder; with one file its report is written once
        more.

    Returns:
        The folder of the new report.

    Raises:
        NumbersError: a file cannot be read, or does not go together with the others.
    """
    files = [file / "report.json" if file.is_dir() else file for file in files]
    together = joined(files, [read_numbers(file) for file in files])
    settings = {"joined": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]}
    path = out or default_folder("study", settings)
    folder = RunFolder(path, settings, BYTES_OF_REPORT)
    _say(folder.greeting, console)
    arms = [each.arm for each in together.facts.arms]
    _report(folder, together, arms, console)
    return path


def _report(folder: RunFolder, numbers: Numbers, arms: Sequence[Arm], console: Console) -> None:
    found = verdicts(numbers.runs, arms, chance=1 / max(1, numbers.facts.classes))
    _print(found, console)
    write_json_lines(folder.file("report.json"), as_document(numbers, found), LINES)
    write_study_report(folder.path, numbers.facts, numbers.runs, found, arms, figures=FIGURES)
    console.print()
    _say(folder.farewell, console)


def _command() -> str:
    return " ".join(["ironmoe", *sys.argv[1:]])


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
        _say(f"{verdict.verdict.upper()}. {verdict.words}", console)


def _say(text: str, console: Console) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
