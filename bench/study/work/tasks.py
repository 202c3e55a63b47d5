"""From options to tasks: which models, and what is measured of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ironmoe.bench.common.errors import flush_denormals
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.study.ladder.arms import LADDER, Arm
from ironmoe.bench.study.measure.table import chosen
from ironmoe.bench.study.options import StudyOptions
from ironmoe.bench.study.work.entries import Entry, ladder_entry
from ironmoe.bench.study.work.group import WorkGroup
from ironmoe.bench.study.work.handed_in import handed_in
from ironmoe.bench.study.work.store import Store
from ironmoe.bench.study.work.worker import Task, Worker

MODELS = "models"
MEASURED = "measured"
LOCKS = "locks"


class Study:
    """The tasks of a study in a folder, in the order in which they are done: seed after seed, so
    that a study which is interrupted has whole seeds."""

    def __init__(self, options: StudyOptions, folder: Path) -> None:
        """Raises UserError, DataError or CheckpointError as ``handed_in`` does."""
        self.options = options
        self.folder = folder
        entries, self.data = self._entries()
        self.guesses = [note for note in self.data.notes if note not in options.data.notes]
        self.tasks = [self._task(entry) for entry in entries]
        self.arms: list[Arm] = list(dict.fromkeys(entry.arm for entry in entries))
        self.images, self.labels = self._test_images()
        checksum = ImageData("test", self.images, self.labels, [], []).checksum
        self.store = Store(folder / MEASURED, checksum)

    def worker(self, group: WorkGroup | None = None) -> Worker:
        """One that works on the tasks. group: the processes that are one worker together."""
        return Worker(self.store, self.folder / LOCKS, self.images, self.labels, group)

    def _entries(self) -> tuple[list[Entry], ImageData]:
        options, data = self.options, self.options.data
        if options.models:
            return handed_in(options.models, data)
        models = self.folder / MODELS
        return [
            ladder_entry(LADDER[arm], training, seed, data, options.training, models)
            for seed in range(options.first_seed, options.first_seed + options.seeds)
            for training in options.trainings
            for arm in options.arms
        ], data

    def _task(self, entry: Entry) -> Task:
        measurements = chosen(self.options.measurements, has_experts=not entry.arm.is_dense)
        return Task(entry, measurements, self.options.budget_of(entry.training))

    def _test_images(self) -> tuple[Tensor, Tensor]:
        """Those that ``ironmoe train`` and the demo leave for tests."""
        # split by the classes of the data, whatever numbers the models have for them
        rows: Tensor = self.options.data.split()[1]
        return self.data.images[rows], self.data.labels[rows]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside the block: the numbers of a study then do not depend on how
    many processes it has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    flush_denormals()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
