"""From what is kept to the rows that claims and figures read."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from torch import Tensor

from ironmoe.bench.study.measure.measurement import Outcome
from ironmoe.bench.study.statistics.measured import Measured
from ironmoe.bench.study.work.digest import digest
from ironmoe.bench.study.work.store import Store
from ironmoe.bench.study.work.worker import Task


class Collected(NamedTuple):
    """runs: one row for each model of which something was measured; problems: what could not be
    measured of models that were handed in, and why; seconds: that the measurements took."""

    runs: list[Measured]
    problems: list[str]
    seconds: float


def collected(tasks: Sequence[Task], store: Store, images: Tensor) -> Collected:
    """Everything that is kept of these tasks. Nothing is trained or measured.

    images: the test images.
    """
    runs: list[Measured] = []
    problems: list[str] = []
    seconds = 0.0
    for task in tasks:
        entry = task.entry
        if not entry.is_trained:
            continue
        known = digest(entry, entry.get(Console(quiet=True)), images)
        outcome = Outcome()
        for what in task.measurements:
            outcome += store.read(known, what, task.budget) or Outcome()
            seconds += store.seconds(known, what, task.budget) or 0.0
        problems += outcome.problems
        if outcome.values:
            runs.append(
                Measured(entry.arm.name, entry.training, entry.seed, outcome.values, outcome.images)
            )
    return Collected(runs, problems, seconds)
