"""The prediction that counts: candidates are predicted again in full precision, with free routing,
and measured in float64.

This file knows what an attempt left behind; the queue knows what becomes of the job.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.engine.active_batch import ActiveBatch, Owner
from ironmoe.attacks.engine.attempts import Attempts, read_columns, select, where
from ironmoe.attacks.engine.counters import (
    Counters,
    counters_from,
    final_columns,
    forget_passes,
    passes_of,
)
from ironmoe.attacks.engine.job import AttemptEnd, Job
from ironmoe.attacks.engine.judging.judge import Judge


class Candidates(NamedTuple):
    """Units that have left an active batch, whose candidates are to be predicted again."""

    batch: ActiveBatch
    owners: list[Owner]
    attempts: Attempts

    @property
    def images(self) -> int:
        return len(self.owners) * self.batch.unit_size

    def bad_units(self) -> list[tuple[Job, list[bool]]]:
        """The jobs of units with an answer that was not finite, and which of their images had it;
        without attempts that are cancelled."""
        bad = self.attempts["bad"].tolist()
        size = self.batch.unit_size
        units = [bad[first : first + size] for first in range(0, len(bad), size)]
        return [
            (owner.job, of_unit)
            for owner, of_unit in zip(self.owners, units, strict=True)
            if any(of_unit) and not owner.job.is_cancelled(owner.attempt)
        ]

    def part(self, places: list[int]) -> "Candidates":
        """Some of the units."""
        size = self.batch.unit_size
        rows = [place * size + one for place in places for one in range(size)]
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.attempts["key"].device)
        owners = [self.owners[place] for place in places]
        return Candidates(self.batch, owners, select(self.attempts, chosen))


def of_first_batch(leaving: Sequence[Candidates]) -> list[Candidates]:
    """Candidates of the active batch that has waited longest, as many as it has places for."""
    batch = leaving[0].batch
    same: list[Candidates] = []
    count = 0
    for item in leaving:
        if item.batch is not batch:
            continue
        count += len(item.owners)
        if same and count > batch.size:
            break
        same.append(item)
    return same


def without_cancelled(leaving: Iterable[Candidates], job: Job | None = None) -> list[Candidates]:
    """What is left once attempts that are cancelled, of one job or of any, are taken out; their
    passes are noted."""
    kept: list[Candidates] = []
    for item in leaving:
        gone = [
            place
            for place, owner in enumerate(item.owners)
            if (job is None or owner.job is job) and owner.job.is_cancelled(owner.attempt)
        ]
        for place in gone:
            item.owners[place].job.note(passes_of(item.part([place]).attempts))
        if gone:
            item = item.part([place for place in range(len(item.owners)) if place not in gone])
        if item.owners:
            kept.append(item)
    return kept


class Verdict(NamedTuple):
    """What the prediction says of one unit of U images.

    counters: what the attempt cost and showed, image by image
    ends: where the attempt left each image
    goes_on: the unit, ready to go on, where the search stopped at a point that is no success after
        all; else None
    denied: the search saw more successes at the very point than the same model, run in the same
        way, now confirms
    bad: which of its images the model gave no finite output for
    """

    owner: Owner
    counters: list[Counters]
    ends: list[AttemptEnd]
    goes_on: Candidates | None
    denied: bool
    bad: list[bool]


class _Predicted(NamedTuple):
    """Candidates after the prediction: columns of numbers on the host, points and ``fell`` (R,) on
    the device."""

    columns: dict[str, list[int]]
    distances: list[float]
    scores: list[float]
    figures: list[float]
    points: Tensor
    fell: Tensor


def verify(candidates: Candidates, judge: Judge) -> list[Verdict]:
    """Predict the candidates again; a verdict for each unit."""
    predicted = _predict(candidates, judge)
    columns = predicted.columns
    size = candidates.batch.unit_size

    verdicts = []
    for number, owner in enumerate(candidates.owners):
        rows = range(number * size, (number + 1) * size)
        unit = None
        if any(columns["goes_on"][row] for row in rows):
            unit = candidates.part([number])
            _take_back(unit.attempts, predicted.fell[rows.start : rows.stop], judge.is_patient)

        verdicts.append(
            Verdict(
                owner=owner,
                counters=[counters_from(columns, row) for row in rows],
                ends=[_end_of(predicted, row, owner) for row in rows],
                goes_on=unit,
                denied=any(columns["denied"][row] for row in rows),
                bad=[bool(columns["bad"][row]) for row in rows],
            )
        )
    return verdicts


def _predict(candidates: Candidates, judge: Judge) -> _Predicted:
    """Predict and measure the candidates of all units in one call."""
    batch = candidates.batch
    attempts = candidates.attempts
    attack = batch.attack

    points = attack.final(attempts, attempts["candidate"])
    tests = [test for owner in candidates.owners for test in owner.job.next_tests()]
    judgement = judge(attack, points, attempts, tests)
    distance = attack.distance(attempts, points)
    fell = judgement.reached & attempts["clean_correct"] & (distance <= attempts["eps"])

    stops_at_first = attack.keeps == "first" and not batch.rounds.keeps_best
    # What the search saw at the very point: one success, or so many images of a group.
    seen = attempts["found"].long()
    if attack.keeps == "last" or batch.rounds.coupled_by_model:
        seen = attempts["best_count"]
    asks_the_same = not attack.attacked_model.differs_from(judge.asked(attack))
    columns = read_columns(
        {
            "fell": fell,
            "prediction": judgement.prediction,
            "hits": judgement.hits[:, 0],
            "later_hits": judgement.hits[:, 1],
            "bad": judgement.bad,
            "found_at": attempts["found_at"],
            "queries": attempts["queries"],
            "goes_on": attempts["found"] & ~fell & stops_at_first,
            "denied": (seen > batch.rounds.of_unit(fell.long())) & asks_the_same,
            **final_columns(attempts, fell, attack.gradient, judge.passes),
        }
    )
    keeps_score = attack.keeps == "best"
    scores = attempts["best_score"].tolist() if keeps_score else [0.0] * candidates.images
    return _Predicted(
        columns,
        distances=distance.tolist(),
        scores=scores,
        figures=judgement.figure.tolist(),
        points=points,
        fell=fell,
    )


def _end_of(predicted: _Predicted, row: int, owner: Owner) -> AttemptEnd:
    """Where the attempt of one image ended."""
    columns = predicted.columns
    has_fallen = bool(columns["fell"][row])
    return AttemptEnd(
        stage=owner.job.stage,
        attempt=owner.attempt,
        score=predicted.scores[row],
        point=predicted.points[row],
        fell=has_fallen,
        prediction=columns["prediction"][row],
        distance=predicted.distances[row],
        steps=_steps(columns, row) if has_fallen else -1,
        figure=predicted.figures[row],
        hits=(columns["hits"][row], columns["later_hits"][row]),
    )


def _steps(columns: dict[str, list[int]], row: int) -> int:
    """How many queries came before the success; all of them, if only the last prediction saw it."""
    found_at = columns["found_at"][row]
    return found_at if found_at >= 0 else columns["queries"][row]


def _take_back(attempts: Attempts, fell: Tensor, is_random: bool) -> None:
    """Let attempts go on whose success the prediction did not confirm; ``fell`` (U,) is what it
    said. An attempt that has no query left hands over its last point instead.

    A single pass of a random model says little: such an attempt no longer stops at one, but hands
    over its last point at the end."""
    again = attempts["found"] & ~fell
    last = again & attempts["finished"]

    attempts["found"] = attempts["found"] & fell
    attempts["found_at"] = attempts["found_at"].masked_fill(again, -1)
    attempts["over"] = attempts["over"] & (last | ~again)
    attempts["candidate"] = where(last, attempts["point"], attempts["candidate"])
    if is_random:
        attempts["stops"] = attempts["stops"] & ~again
    forget_passes(attempts)
