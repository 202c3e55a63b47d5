"""One worker of a study, a process or a group of processes: it takes models that nobody works on,
trains and measures them."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Measurement, Outcome
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.bench.study.work.claimed import claimed
from ironmoe.bench.study.work.digest import digest
from ironmoe.bench.study.work.entries import Entry
from ironmoe.bench.study.work.group import WorkGroup
from ironmoe.bench.study.work.store import Store
from ironmoe.moe.distributed import RanksDisagreeError, in_step
from ironmoe.moe.exchange.errors import is_of_exchange

QUIET = Console(quiet=True)
TRAINED = "trained"
NEXT = "the next model of the study"
PATIENCE = 2.0  # seconds between two looks at models that other processes work on
OF_ONE_RANK = (RanksDisagreeError, MemoryError, torch.OutOfMemoryError)
"""Errors that say nothing of the model. The other processes of the group may not have them."""


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
    """Works on tasks in their order. images (N, C, S, S), labels (N,): the test images; group: the
    processes that do each task together, of which each has a worker."""

    def __init__(
        self,
        store: Store,
        locks: Path,
        images: Tensor,
        labels: Tensor,
        group: WorkGroup | None = None,
    ) -> None:
        self.store = store
        self.locks = locks
        self.images = images
        self.labels = labels
        self.group = group or WorkGroup()

    def run(self, tasks: Sequence[Task], tell: Callable[[Done], None]) -> None:
        """Do what is left of the tasks, until all are done by this group or by others. A task
        whose process was killed is done by another one.

        tell: called in the first process of the group after each piece.
        """
        if self.group.is_first:
            self._lead(tasks, tell)
        else:
            self._follow(tasks)

    def _lead(self, tasks: Sequence[Task], tell: Callable[[Done], None]) -> None:
        left = list(range(len(tasks)))
        while left:
            held_by_others = []
            for number in left:
                task = tasks[number]
                with claimed(self.locks / f"{task.entry.slug}.lock") as mine:
                    if mine:
                        self.group.same(number, NEXT)
                        self._do(task, number, tell)
                    else:
                        held_by_others.append(number)
            left = held_by_others
            if left:
                time.sleep(PATIENCE)
        self.group.same(None, NEXT)

    def _follow(self, tasks: Sequence[Task]) -> None:
        """Take part in what the first process of the group does."""
        while (number := self.group.same(None, NEXT)) is not None:
            self._do(tasks[number], number, lambda _: None)

    def _do(self, task: Task, number: int, tell: Callable[[Done], None]) -> None:
        model = self._trained(task, number, tell)
        known = self.group.same(digest(task.entry, model, self.images), "the digest of a model")
        subject, is_shared = Subject(model, self.images, self.labels), self.group.can_share(model)

        def together(what: Measurement) -> bool:
            return is_shared and not what.needs_whole_weights

        # what one process does comes first, while it has all weights
        for what in sorted(self._left(known, task), key=together):
            start = time.perf_counter()
            measure = self._together if together(what) else self._by_the_first
            outcome = measure(what, subject, task)
            if outcome is None:  # this is not the first process
                continue
            seconds = time.perf_counter() - start
            self.store.write(
                known, what, task.budget, outcome, name=task.entry.name, seconds=seconds
            )
            tell(Done(number, what.name, seconds, outcome.values, outcome.problems))

    def _trained(self, task: Task, number: int, tell: Callable[[Done], None]) -> nn.Module:
        """The model with all weights, which the first process trains by itself: to the bits of one
        process, whatever the size of the group."""
        start, was_trained = time.perf_counter(), task.entry.is_trained
        made = self.group.first(lambda: task.entry.get(QUIET), f"the training of {task.entry.name}")
        if not was_trained:
            tell(Done(number, TRAINED, time.perf_counter() - start, {}))
        if made is not None:
            return made
        if not task.entry.is_trained:
            raise UserError(
                f"every process of a group must see the same folder, got no {task.entry.file} in "
                f"process {self.group.rank} of the group"
            )
        return task.entry.get(QUIET)

    def _left(self, known: str, task: Task) -> list[Measurement]:
        """What is still to be measured of the model with this digest."""
        missing = [
            each.name
            for each in task.measurements
            if self.store.read(known, each, task.budget) is None
        ]
        names = self.group.same(missing, "what is left to measure")
        return [each for each in task.measurements if each.name in names]

    def _by_the_first(self, what: Measurement, subject: Subject, task: Task) -> Outcome | None:
        """The outcome in the first process, None in the others."""
        return self.group.first(partial(self._measured, what, subject, task), what.name)

    def _together(self, what: Measurement, subject: Subject, task: Task) -> Outcome | None:
        """The same of a measurement in which all take part: all do the same, and share the work of
        each pass of the model."""
        self.group.share(subject.model)
        with in_step(subject.model):
            outcome = self._measured(what, subject, task)
        return outcome if self.group.is_first else None

    def _measured(self, what: Measurement, subject: Subject, task: Task) -> Outcome:
        """The outcome. Where a model that was handed in cannot be measured so, whatever its code
        raises, the outcome says why; with a model of the ladder that would be a bug."""
        try:
            outcome = what.measure(subject, task.budget)
        except Exception as error:
            may_be_of_one_rank = self.group.size > 1 and (
                isinstance(error, OF_ONE_RANK) or is_of_exchange(error)
            )
            if task.entry.file is not None or may_be_of_one_rank:
                raise
            outcome = Outcome(problems=(f"{error}" or type(error).__name__,))
        said = tuple(f"{what.name} of {task.entry.name}: {each}" for each in outcome.problems)
        return outcome._replace(problems=said)
