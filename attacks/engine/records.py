"""What is known of each image, in columns: a few bytes an image, however large the data set."""

from array import array
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.engine.counters import Counters
from ironmoe.attacks.engine.job import Job


class Record(NamedTuple):
    """One image under one attack, so far.

    example: the image's number in the data
    attack: the attack's number
    label, clean_prediction: classes
    clean_correct: the clean prediction is right
    passed: how many stages the image has passed
    fell: it did not pass the next one
    decided: nothing is left to do
    prediction, distance: those of the final image
    steps: how many queries came before the success; −1 without success
    counters: what was counted of it
    offset, end: where the final image begins and ends in the file of images; −1 without one
    rank: the number of the process that wrote this file
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
    counters: Counters
    offset: int = -1
    end: int = -1
    rank: int = 0

    def flat(self) -> dict[str, Any]:
        """Name → number, the counters among the others: a row of a table, a line of a journal."""
        values = self._asdict()
        counters = values.pop("counters")
        images = {name: values.pop(name) for name in ("offset", "end", "rank")}
        return values | counters._asdict() | images


def record_from(values: Mapping[str, Any]) -> Record:
    """The record of such a row. TypeError: it has other names."""
    counters = {name: value for name, value in values.items() if name in Counters._fields}
    others = {name: value for name, value in values.items() if name not in counters}
    if len(counters) < len(Counters._fields):
        raise TypeError(f"a record must have {Counters._fields}, got {tuple(values)}")
    return Record(counters=Counters(**counters), **others)


FLOATS = ("distance",)
COLUMNS = (*(name for name in Record._fields if name != "counters"), *Counters._fields)


class Records:
    """Records by (attack, example). A record that knows as much or more takes the place of another
    one."""

    def __init__(self) -> None:
        self._columns = {name: array("d" if name in FLOATS else "q") for name in COLUMNS}
        self._place: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._place)

    def __iter__(self) -> Iterator[Record]:
        return (self._at(place) for place in range(len(self)))

    def add(self, record: Record) -> None:
        key = (record.attack, record.example)
        known = self.get(*key)

        if known is None:
            self._place[key] = len(self._place)
            for name, value in record.flat().items():
                self._columns[name].append(value)
        elif (record.decided, record.passed) >= (known.decided, known.passed):
            for name, value in record.flat().items():
                self._columns[name][self._place[key]] = value

    def get(self, attack: int, example: int) -> Record | None:
        place = self._place.get((attack, example))
        return None if place is None else self._at(place)

    def of_attack(self, number: int, examples: Tensor | None = None) -> dict[str, Tensor]:
        """Column → tensor (N,), in the order of the examples, of all or of these. The distance is
        float64, everything else int64."""
        columns = {
            name: torch.tensor(column, dtype=torch.float64 if name in FLOATS else torch.int64)
            for name, column in self._columns.items()
        }
        mine = columns["attack"] == number
        if examples is not None:
            mine &= torch.isin(columns["example"], examples)

        order = columns["example"][mine].argsort()
        return {name: column[mine][order] for name, column in columns.items()}

    def _at(self, place: int) -> Record:
        return record_from({name: column[place] for name, column in self._columns.items()})


def records_of(job: Job, final: bool) -> Iterator[Record]:
    """A record of each image of a job; ``final``: nothing is left to do."""
    for one, example in enumerate(job.examples):
        end = job.ends[one]
        fell = job.has_fallen(one)
        passed = job.stage + (final and example.clean_correct)

        yield Record(
            example=example.number,
            attack=job.chain,
            label=example.label,
            clean_prediction=example.clean_prediction,
            clean_correct=example.clean_correct,
            passed=end.stage if end is not None and fell else passed,
            fell=fell,
            decided=final,
            prediction=example.clean_prediction if end is None else end.prediction,
            distance=0.0 if end is None else end.distance,
            steps=-1 if end is None else end.steps,
            counters=job.counters[one].with_verdict(fell),
        )
