"""What is known of each image, in columns: a few bytes an image, however large the data set."""

import math
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
    clean_figure, figure: the goal's figure for the clean and for the final image; NaN without one
    skipped: the model gives nothing finite for it, so that it is neither robust nor fallen
    hits: of a random model, how many passes reached the goal, two numbers a point (of the first and
        of the second half of the passes): of the clean image, and of the best point for each radius
        that is done
    alike: of a random model, how many times as much a pass varied as one whose images draw for
        themselves
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
    clean_figure: float = math.nan
    figure: float = math.nan
    skipped: int = 0
    hits: tuple[int, ...] = ()
    alike: float = 1.0
    offset: int = -1
    end: int = -1
    rank: int = 0

    def flat(self) -> dict[str, Any]:
        """Name → value, the counters among the others: a line of a journal. What most evaluations
        have not is left out where it is not there."""
        values = self._asdict()
        counters = values.pop("counters")
        images = {name: values.pop(name) for name in ("offset", "end", "rank")}
        for name in ("clean_figure", "figure"):
            if math.isnan(values[name]):
                del values[name]
        for name in ("skipped", "hits"):
            if not values[name]:
                del values[name]
        if values["alike"] == 1:
            del values["alike"]
        return values | counters._asdict() | images


def record_from(values: Mapping[str, Any]) -> Record:
    """The record of such a row. TypeError: it has other names."""
    counters = {name: value for name, value in values.items() if name in Counters._fields}
    others = {name: value for name, value in values.items() if name not in counters}
    if len(counters) < len(Counters._fields):
        raise TypeError(f"a record must have {Counters._fields}, got {tuple(values)}")
    if "hits" in others:
        others["hits"] = tuple(others["hits"])
    return Record(counters=Counters(**counters), **others)


FLOATS = ("distance", "clean_figure", "figure", "alike")
COLUMNS = (
    *(name for name in Record._fields if name not in ("counters", "hits")),
    *Counters._fields,
)


class Records:
    """Records by (attack, example). A record that knows as much or more takes the place of another
    one."""

    def __init__(self) -> None:
        self._columns = {name: array("d" if name in FLOATS else "q") for name in COLUMNS}
        self._place: dict[tuple[int, int], int] = {}
        self._hits: dict[int, tuple[int, ...]] = {}  # by place, of random models alone

    def __len__(self) -> int:
        return len(self._place)

    def __iter__(self) -> Iterator[Record]:
        return (self._at(place) for place in range(len(self)))

    def add(self, record: Record) -> None:
        key = (record.attack, record.example)
        known = self.get(*key)

        values = record._asdict() | record.counters._asdict()
        if known is None:
            self._place[key] = len(self._place)
            for name, column in self._columns.items():
                column.append(values[name])
        elif (record.decided, record.passed) >= (known.decided, known.passed):
            for name, column in self._columns.items():
                column[self._place[key]] = values[name]
        else:
            return

        if record.hits:
            self._hits[self._place[key]] = record.hits

    def get(self, attack: int, example: int) -> Record | None:
        place = self._place.get((attack, example))
        return None if place is None else self._at(place)

    def of_attack(self, number: int, examples: Tensor | None = None) -> dict[str, Tensor]:
        """Column → tensor (N,), in the order of the examples, of all or of these. Distances and
        figures are float64, everything else int64; ``hits`` is (N, points, 2), with no points if
        each verdict rests on one pass. Where a point is missing, the one before stands for it."""
        columns = {
            name: torch.tensor(column, dtype=torch.float64 if name in FLOATS else torch.int64)
            for name, column in self._columns.items()
        }
        mine = columns["attack"] == number
        if examples is not None:
            mine &= torch.isin(columns["example"], examples)

        order = columns["example"][mine].argsort()
        table = {name: column[mine][order] for name, column in columns.items()}
        table["hits"] = self._hits_of(mine.nonzero().squeeze(1)[order].tolist())
        return table

    def _hits_of(self, places: list[int]) -> Tensor:
        rows = [self._hits.get(place, ()) for place in places]
        points = max(map(len, rows), default=0)
        padded = [list(row) + list(row[-2:]) * ((points - len(row)) // 2) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).view(len(rows), points // 2, 2)

    def _at(self, place: int) -> Record:
        values: dict[str, Any] = {name: column[place] for name, column in self._columns.items()}
        return record_from(values | {"hits": self._hits.get(place, ())})


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
            clean_figure=example.figure,
            figure=example.figure if end is None else end.figure,
            skipped=job.skipped[one],
            hits=tuple(n for pair in job.hits[one] for n in pair) if job.is_random else (),
        )
