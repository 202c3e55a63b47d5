"""What an evaluation knows of each image, in columns: a few bytes an image, however large the data
set."""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.engine.job import Job


class Record(NamedTuple):
    """One image under one attack, so far.

    example, its number in the data; attack, its number, label, clean_prediction; clean_correct
    passed: stages it has passed; fell: it did not pass the next one; decided: nothing is left to do
    prediction, distance: of the final image; steps to success, −1 without
    found: the search took some point for a success; forwards, backwards it took part in;
        zero_gradient, loss_rising: flags
    offset, end, rank: of its final image in the file of images of that process; −1 if there is none
    """

    example: int
    attack: int
    label: int
    clean_prediction: int
    clean_correct: int
    passed: int
    fell: int
    decided: int
    prediction: int
    distance: float
    steps: int
    found: int
    forwards: int
    backwards: int
    zero_gradient: int
    loss_rising: int
    offset: int = -1
    end: int = -1
    rank: int = 0


class Records:
    """Records by (attack, index); one that knows as much or more takes the place of another."""

    def __init__(self) -> None:
        self._columns = {
            name: array("d" if kind is float else "q")
            for name, kind in Record.__annotations__.items()
        }
        self._place: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._place)

    def add(self, record: Record) -> None:
        key = (record.attack, record.example)
        known = self.get(*key)
        if known is not None:
            if (record.decided, record.passed) < (known.decided, known.passed):
                return
            for name, value in record._asdict().items():
                self._columns[name][self._place[key]] = value
        else:
            self._place[key] = len(self._place)
            for name, value in record._asdict().items():
                self._columns[name].append(value)

    def get(self, attack: int, index: int) -> Record | None:
        place = self._place.get((attack, index))
        return (
            None if place is None else Record(*(column[place] for column in self._columns.values()))
        )

    def __iter__(self) -> Iterator[Record]:
        return (Record(*values) for values in zip(*self._columns.values(), strict=True))

    def of_attack(self, number: int, examples: Tensor | None = None) -> dict[str, Tensor]:
        """Column → tensor, in the order of the indices, of all or of these examples. Integers as
        int64, distance as float64."""
        kinds = {
            name: torch.float64 if kind is float else torch.int64
            for name, kind in Record.__annotations__.items()
        }
        columns = {
            name: torch.tensor(column, dtype=kinds[name]) for name, column in self._columns.items()
        }
        mine = columns["attack"] == number
        mine &= True if examples is None else torch.isin(columns["example"], examples)
        order = columns["example"][mine].argsort()
        return {name: column[mine][order] for name, column in columns.items()}


def records_of(job: Job, final: bool) -> Iterator[Record]:
    """A record for each image of a case."""
    for one, index in enumerate(job.numbers):
        outcome = job.outcomes[one]
        success = outcome is not None and outcome.success
        yield Record(
            example=index,
            attack=job.chain,
            label=job.labels[one],
            clean_prediction=job.clean_prediction[one],
            clean_correct=job.correct[one],
            passed=outcome.stage
            if outcome is not None and success
            else job.stage + (final and job.correct[one]),
            fell=success,
            decided=final,
            prediction=job.clean_prediction[one] if outcome is None else outcome.prediction,
            distance=0.0 if outcome is None else outcome.distance,
            steps=-1 if outcome is None else outcome.steps,
            found=job.found[one] or success,
            forwards=job.forwards[one],
            backwards=job.backwards[one],
            zero_gradient=job.zero_gradient[one],
            loss_rising=job.loss_rising[one] and not success,
        )
