"""``ironmoe study``: do what is left, then say what it shows."""

from pathlib import Path

from rich.console import Console

from ironmoe.bench.common.run_folder import RunFolder, default_folder
from ironmoe.bench.study.claims.parts.verdict import Verdict, as_entry
from ironmoe.bench.study.claims.table import verdicts
from ironmoe.bench.study.options import StudyOptions
from ironmoe.bench.study.work.collected import collected
from ironmoe.bench.study.work.display import StudyDisplay
from ironmoe.bench.study.work.plan import announcement, make_plan
from ironmoe.bench.study.work.processes import work
from ironmoe.bench.study.work.tasks import Study, one_thread

BYTES_OF_MODEL = 20_000_000  # weights, and the state while it is trained


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
    folder.write(
        "report.json",
        {
            "settings": options.settings,
            "arms": [arm._asdict() for arm in study.arms],
            "runs": [run._asdict() for run in kept.runs],
            "problems": kept.problems,
            "verdicts": [as_entry(verdict) for verdict in found],
        },
    )
    _print(found, console)
    return path


def _print(found: list[Verdict], console: Console) -> None:
    """The verdicts on the terminal, one claim after another."""
    for verdict in found:
        console.print(
            f"\n{verdict.training}: {verdict.sentence}", highlight=False, markup=False, style="bold"
        )
        console.print(f"{verdict.verdict.upper()}. {verdict.words}", highlight=False, markup=False)
