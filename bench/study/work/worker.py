"""One process of a study: it takes models that nobody works on, trains and measures them."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from torch import Tensor

from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Measurement, Outcome
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.bench.study.work.claimed import claimed
from ironmoe.bench.study.work.digest import digest
from ironmoe.bench.study.work.entries import Entry
from ironmoe.bench.study.work.store import Store

TRAINED = "trained"
PATIENCE = 2.0  # seconds between two looks at models that other processes work on


class Task(NamedTuple):
    """A model, what is to be measured of it, and how much."""

    entry: Entry
    measurements: tuple[Measurement, ...]
    budget: Budget


class Done(NamedTuple):
    """What a process tells after each piece. number: of the task; what: TRAINED, or the name of a
    measurement; seconds: that it took; values: of the model; problems: why some are missing."""

    number: int
    what: str
    seconds: float
    values: dict[str, float]
    problems: tuple[str, ...] = ()


class Worker:
    """Works on tasks in their order. images (N, C, S, S), labels (N,): the test images."""

    def __init__(self, store: Store, locks: Path, images: Tensor, labels: Tensor) -> None:
        self.store = store
        self.locks = locks
        self.images = images
        self.labels = labels

    def run(self, tasks: Sequence[Task], tell: Callable[[Done], None]) -> None:
        """Do what is left of the tasks, until all are done by this process or by others. A task
        whose process was killed is done by another one."""
        left = list(range(len(tasks)))
        while left:
            held_by_others = []
            for number in left:
                task = tasks[number]
                with claimed(self.locks / f"{task.entry.slug}.lock") as mine:
                    if mine:
                        self._do(task, number, tell)
                    else:
                        held_by_others.append(number)
            left = held_by_others
            if left:
                time.sleep(PATIENCE)

    def _do(self, task: Task, number: int, tell: Callable[[Done], None]) -> None:
        start, was_trained = time.perf_counter(), task.entry.is_trained
        model = task.entry.get(Console(quiet=True))
        if not was_trained:
            tell(Done(number, TRAINED, time.perf_counter() - start, {}))

        known = digest(task.entry, model, self.images)
        subject = Subject(model, self.images, self.labels)
        for what in task.measurements:
            if self.store.read(known, what, task.budget) is not None:
                continue
            start = time.perf_counter()
            outcome = self._measured(what, subject, task)
            seconds = time.perf_counter() - start
            self.store.write(
                known, what, task.budget, outcome, name=task.entry.name, seconds=seconds
            )
            tell(Done(number, what.name, seconds, outcome.values, outcome.problems))

    def _measured(self, what: Measurement, subject: Subject, task: Task) -> Outcome:
        """The outcome. Where a model that was handed in cannot be measured so, whatever its code
        raises, the outcome says why; with a model of the ladder that would be a bug."""
        try:
            outcome = what.measure(subject, task.budget)
        except Exception as error:
            if task.entry.file is not None:
                raise
            outcome = Outcome(problems=(f"{error}" or type(error).__name__,))
        said = tuple(f"{what.name} of {task.entry.name}: {each}" for each in outcome.problems)
        return outcome._replace(problems=said)
