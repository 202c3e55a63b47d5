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
    goes_on: the search stopped at a point that is no success after all, so it must go on from there
    fell: (U,) bool; ends: where the attempt left each image
    """

    owner: Owner
    counters: list[Counters]
    goes_on: bool
    fell: Tensor
    ends: list[AttemptEnd]


def verify(candidates: Candidates) -> list[Verdict]:
    """Predict the candidates again; a verdict for each unit."""
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
    distances = distance.tolist()
    scores = attempts["best_score"].tolist()

    def end_of(row: int, owner: Owner) -> AttemptEnd:
        has_fallen = bool(columns["fell"][row])
        return AttemptEnd(
            stage=owner.job.stage,
            attempt=owner.attempt,
            score=scores[row] if attack.keeps == "best" else 0.0,
            point=points[row],
            fell=has_fallen,
            prediction=columns["prediction"][row],
            distance=distances[row],
            steps=_steps(columns, row) if has_fallen else -1,
        )

    verdicts = []
    for number, owner in enumerate(candidates.owners):
        first = number * batch.unit_size
        rows = range(first, first + batch.unit_size)
        verdicts.append(
            Verdict(
                owner=owner,
                counters=[counters_from(columns, row) for row in rows],
                goes_on=any(columns["goes_on"][row] for row in rows),
                fell=fell[first : first + batch.unit_size],
                ends=[end_of(row, owner) for row in rows],
            )
        )
    return verdicts


def _steps(columns: dict[str, list[int]], row: int) -> int:
    """How many queries came before the success; all of them, if only the last prediction saw it."""
    found_at = columns["found_at"][row]
    return found_at if found_at >= 0 else columns["queries"][row]


def take_back(attempts: Attempts, fell: Tensor) -> None:
    """Let attempts go on whose success the prediction did not confirm; ``fell`` (U,) is what it
    said. An attempt that has no query left hands over its last point instead."""
    again = attempts["found"] & ~fell
    last = again & attempts["finished"]

    attempts["found"] = attempts["found"] & fell
    attempts["found_at"] = attempts["found_at"].masked_fill(again, -1)
    attempts["over"] = attempts["over"] & (last | ~again)
    attempts["candidate"] = where(last, attempts["point"], attempts["candidate"])
    forget_passes(attempts)
