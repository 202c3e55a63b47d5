"""The prediction that counts: candidates are predicted again in full precision, with free routing,
and measured in float64.

This file knows what an attempt left behind; the queue knows what becomes of the job.
"""

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
)
from ironmoe.attacks.engine.job import AttemptEnd


class Candidates(NamedTuple):
    """Units that have left an active batch, whose candidates are to be predicted again."""

    batch: ActiveBatch
    owners: list[Owner]
    attempts: Attempts

    @property
    def images(self) -> int:
        return len(self.owners) * self.batch.unit_size

    def part(self, places: list[int]) -> "Candidates":
        """Some of the units."""
        size = self.batch.unit_size
        rows = [place * size + one for place in places for one in range(size)]
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.attempts["label"].device)
        owners = [self.owners[place] for place in places]
        return Candidates(self.batch, owners, select(self.attempts, chosen))


class Verdict(NamedTuple):
    """What the prediction says of one unit of U images.

    counters: what the attempt cost and showed, image by image
    ends: where the attempt left each image
    goes_on: the unit, ready to go on, where the search stopped at a point that is no success after
        all; else None
    """

    owner: Owner
    counters: list[Counters]
    ends: list[AttemptEnd]
    goes_on: Candidates | None


class _Predicted(NamedTuple):
    """Candidates after the prediction: columns of numbers on the host, points and ``fell`` (R,) on
    the device."""

    columns: dict[str, list[int]]
    distances: list[float]
    scores: list[float]
    points: Tensor
    fell: Tensor


def verify(candidates: Candidates) -> list[Verdict]:
    """Predict the candidates again; a verdict for each unit."""
    predicted = _predict(candidates)
    columns = predicted.columns
    size = candidates.batch.unit_size

    verdicts = []
    for number, owner in enumerate(candidates.owners):
        rows = range(number * size, (number + 1) * size)
        unit = None
        if any(columns["goes_on"][row] for row in rows):
            unit = candidates.part([number])
            _take_back(unit.attempts, predicted.fell[rows.start : rows.stop])

        verdicts.append(
            Verdict(
                owner=owner,
                counters=[counters_from(columns, row) for row in rows],
                ends=[_end_of(predicted, row, owner) for row in rows],
                goes_on=unit,
            )
        )
    return verdicts


def _predict(candidates: Candidates) -> _Predicted:
    """Predict and measure the candidates of all units in one call."""
    batch = candidates.batch
    attempts = candidates.attempts
    attack = batch.attack

    ball = attack.ball(attempts)
    points = ball.tighten(attempts["candidate"])
    logits = attack.attacked_model.predict(points)
    distance = ball.distance(points)
    fell = attack.fooled(logits, attempts) & attempts["clean_correct"]
    fell = fell & (distance <= attempts["eps"])

    stops_at_first = attack.keeps == "first" and not batch.rounds.keeps_best
    columns = read_columns(
        {
            "fell": fell,
            "prediction": logits.argmax(1),
            "found_at": attempts["found_at"],
            "queries": attempts["queries"],
            "goes_on": attempts["found"] & ~fell & stops_at_first,
            **final_columns(attempts, fell, attack.gradient),
        }
    )
    keeps_score = attack.keeps == "best"
    scores = attempts["best_score"].tolist() if keeps_score else [0.0] * candidates.images
    return _Predicted(columns, distance.tolist(), scores, points, fell)


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
    )


def _steps(columns: dict[str, list[int]], row: int) -> int:
    """How many queries came before the success; all of them, if only the last prediction saw it."""
    found_at = columns["found_at"][row]
    return found_at if found_at >= 0 else columns["queries"][row]


def _take_back(attempts: Attempts, fell: Tensor) -> None:
    """Let attempts go on whose success the prediction did not confirm; ``fell`` (U,) is what it
    said. An attempt that has no query left hands over its last point instead."""
    again = attempts["found"] & ~fell
    last = again & attempts["finished"]

    attempts["found"] = attempts["found"] & fell
    attempts["found_at"] = attempts["found_at"].masked_fill(again, -1)
    attempts["over"] = attempts["over"] & (last | ~again)
    attempts["candidate"] = where(last, attempts["point"], attempts["candidate"])
    forget_passes(attempts)
