"""The engine: one queue over images × attacks × eps × targets × restarts.

Each attack has a lane, a batch that stays full: what is finished leaves, the next enters, inside the run. An image moves on to the
next stage of its chain when the attempts of one have failed. The lane furthest down that can be filled runs first, so that few
images are on their way at once, however large the data set.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.case import Case, Stage, Tried
from ironmoe.attacks.lane import Lane, Owner
from ironmoe.attacks.rows import Rows, joined, select

FLAGS_READ_EVERY = 8  # rounds on a GPU; on CPU looking costs nothing
FREE_UP_TO = {"cpu": 16, "cuda": 128}  # units that cost hardly more than one


class Chunk(NamedTuple):
    """n images from the data: images (n, …), labels (n,), indices (n,) int64, eps (n,) float64 or None."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    eps: Tensor | None = None


class Budget:
    """What an evaluation may cost. A forward pass of one image is one forward; nothing is begun that could go beyond."""

    def __init__(self, max_forwards: int | None = None, max_seconds: float | None = None) -> None:
        for name, value in {"max_forwards": max_forwards, "max_seconds": max_seconds}.items():
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0 or None, got {value}")
        self.max_forwards, self.max_seconds = max_forwards, max_seconds
        self.began = time.monotonic()

    def allows(self, spent: int, more: int) -> bool:
        in_time = self.max_seconds is None or time.monotonic() - self.began < self.max_seconds
        return in_time and (self.max_forwards is None or spent + more <= self.max_forwards)


class Engine:
    """Runs every image of a source through chains of attacks.

    Args:
        chains: each a sequence of stages that an image goes through until it falls. Equal attacks share a lane.
        unit: images that must stay together; the source gives a multiple of it.
        batch_size: images a lane holds at most.
        emit: called with (case, decided) when a case has passed a stage, when it is decided, and when the budget leaves it undecided.
        begin_at: (chain, first index of the unit) → the stage to begin with; as many as there are stages: nothing to do.
    """

    def __init__(
        self,
        chains: Sequence[Sequence[Stage]],
        emit: Callable[[Case, bool], None],
        *,
        batch_size: int,
        unit: int = 1,
        budget: Budget | None = None,
        begin_at: Callable[[int, int], int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.chains, self.emit, self.unit = chains, emit, unit
        self.units = max(1, batch_size // unit)
        self.budget, self.begin_at = budget or Budget(), begin_at or (lambda chain, index: 0)
        self.kind = "cpu" if device is None else device.type
        attacks = dict.fromkeys(stage.attack for chain in chains for stage in chain)
        self.lanes = {
            attack: Lane(attack, self.units, unit, self.kind != "cpu", FREE_UP_TO.get(self.kind, 16)) for attack in attacks
        }
        self.victims = list(dict.fromkeys(attack.victim for attack in attacks))
        self.spent_before = self._forwards()
        self.leaving: list[tuple[list[Owner], Rows]] = []  # candidates to be predicted in full precision
        self.clean_logits_wanted = max((a.targets for a in attacks), default=0)

    @property
    def spent(self) -> int:
        """Forward passes of single images so far."""
        return self._forwards() - self.spent_before

    def run(self, source: Iterable[Chunk]) -> bool:
        """All of the source; False if the budget ended it before."""
        chunks: Iterator[Chunk] | None = iter(source)
        while True:
            lane = self._fullest_downstream()
            if lane is None and chunks is not None:
                chunk = next(chunks, None)
                chunks = chunks if chunk is not None else None
                if chunk is not None and not self._admit(chunk):
                    return self._stop()
                continue
            lane = lane or self._upstream_with_work()
            if self._waiting >= self.units or (self.leaving and (lane is None or self._waiting * 4 >= lane.active)):
                self._verify()
                continue
            if lane is None:
                return True
            if not self.budget.allows(self.spent, lane.cost_to_fill + self._waiting * self.unit):
                return self._stop()
            lane.fill(draining=chunks is None)
            for _ in range(1 if self.kind == "cpu" else FLAGS_READ_EVERY):
                asked = len(lane.owners) * self.unit
                passes = asked * lane.attack.questions(max(asked, 1), self.kind)
                if not self.budget.allows(self.spent, passes + asked + self._waiting * self.unit):
                    return self._stop()
                if lane.has_questions:
                    lane.round()
            self._collect(lane)

    def _drop_cancelled(self, case: Case, lane: Lane) -> None:
        """Its later attempts, wherever they are."""
        lane.drop_cancelled(case)
        for number, (owners, rows) in enumerate(self.leaving):
            kept = [
                place for place, owner in enumerate(owners) if owner.case is not case or not case.is_cancelled(owner.attempt)
            ]
            for place in sorted(set(range(len(owners))) - set(kept)):
                case.note_cost(self._unit_of(rows, place))
            if len(kept) < len(owners):
                self.leaving[number] = ([owners[place] for place in kept], self._units_of(rows, kept))
        self.leaving = [item for item in self.leaving if item[0]]

    def _stop(self) -> bool:
        """The candidates that are known are still predicted, as far as the number of forwards allows; the rest is undecided."""
        self.budget.max_seconds = None
        while self.leaving:
            before = self._waiting
            self._verify()
            if self._waiting >= before:
                break
        undecided = [owner.case for owners, _ in self.leaving for owner in owners]
        for lane in self.lanes.values():
            undecided += [owner.case for owner in lane.owners if owner is not None]
            undecided += [*lane.ready, *(owner.case for owner, _ in lane.returning)]
        for case in dict.fromkeys(undecided):
            self.emit(case, False)
        return False

    def _fullest_downstream(self) -> Lane | None:
        return next((lane for lane in reversed(self.lanes.values()) if lane.load >= lane.size), None)

    def _upstream_with_work(self) -> Lane | None:
        return next((lane for lane in self.lanes.values() if lane.load), None)

    @property
    def _waiting(self) -> int:
        """Units whose candidates are to be predicted."""
        return sum(len(owners) for owners, _ in self.leaving)

    def _unit_of(self, rows: Rows, number: int) -> Rows:
        return {name: value[number * self.unit : (number + 1) * self.unit] for name, value in rows.items()}

    def _units_of(self, rows: Rows, numbers: list[int]) -> Rows:
        places = [number * self.unit + one for number in numbers for one in range(self.unit)]
        return select(rows, torch.tensor(places, dtype=torch.int64, device=rows["label"].device))

    def _forwards(self) -> int:
        return sum(victim.forwards for victim in self.victims)

    def _admit(self, chunk: Chunk) -> bool:
        """Predict clean images and queue them; False if the budget forbids."""
        count = len(chunk.labels)
        if not self.budget.allows(self.spent, count + self._waiting * self.unit):
            return False
        logits = self.chains[0][0].attack.victim.predict(chunk.images)
        if count and int(chunk.labels.max()) >= logits.shape[1]:
            raise ValueError(f"labels must be below the model's {logits.shape[1]} classes, got {int(chunk.labels.max())}")
        ranked = logits.topk(min(self.clean_logits_wanted + 1, logits.shape[1]), dim=1).indices
        # The label moves to the end, and off it if it was not among them.
        others = ranked.gather(1, (ranked == chunk.labels.unsqueeze(1)).to(torch.int8).argsort(dim=1, stable=True))[:, :-1]
        prediction, classes, labels, numbers = (t.tolist() for t in (logits.argmax(1), others, chunk.labels, chunk.indices))
        eps, images = None if chunk.eps is None else chunk.eps.tolist(), chunk.images.split(self.unit)
        for number, chain in enumerate(self.chains):
            right = (~chain[0].attack.fooled(logits, {"label": chunk.labels})).tolist()
            for place, first in enumerate(range(0, count, self.unit)):
                one = slice(first, first + self.unit)
                begin = self.begin_at(number, numbers[first])
                if begin < len(chain):
                    case = Case(
                        number, chain, images[place], labels[one], numbers[one], right[one], prediction[one], classes[one],
                        None if eps is None else eps[one], begin,
                    )  # fmt: skip
                    self._enter(case)
        return True

    def _enter(self, case: Case) -> None:
        """Into the lane of its stage, if there is something to attack."""
        if not any(case.correct) and not case.attack.attacks_wrong:
            self.emit(case, True)
        else:
            self.lanes[case.attack].ready.append(case)

    def _collect(self, lane: Lane) -> None:
        """Units that are over leave; their candidates wait for the prediction that counts."""
        left = lane.harvest()
        if left is None:
            return
        owners, rows = left
        point = rows["point"]
        if lane.attack.keeps != "last":
            kept = rows["found"] if lane.attack.keeps == "first" and self.unit == 1 else torch.ones_like(rows["found"])
            point = torch.where(kept.view(-1, *(1,) * (point.ndim - 1)), rows["candidate"], point)
        rows["candidate"] = point
        self.leaving.append((owners, rows))

    def _verify(self) -> None:
        """Predict the candidates of one attack in full precision and settle their attempts."""
        attack = self.leaving[0][0][0].case.attack
        same = [item for item in self.leaving if item[0][0].case.attack is attack]
        while len(same) > 1 and sum(len(owners) for owners, _ in same) > self.units:
            same.pop()
        owners = [owner for owners, _ in same for owner in owners]
        if not self.budget.allows(self.spent, len(owners) * self.unit):
            return
        taken = {id(item) for item in same}
        self.leaving = [item for item in self.leaving if id(item) not in taken]
        rows = joined([part for _, part in same])
        ball = attack.ball(rows)
        points = ball.tighten(rows["candidate"])
        logits = attack.victim.predict(points)
        distance = ball.distance(points)
        success = attack.fooled(logits, rows) & rows["clean_correct"] & (distance <= rows["eps"])
        rising = attack.gradient & (rows["loss_best"] - rows["loss_late"] > 0.05 * (rows["loss_best"] - rows["loss_first"]))
        table = torch.stack(
            [
                success, logits.argmax(1), rows["found_at"], rows["queries"], rows["found"], rows["finished"],
                rows["forwards"] + 1, rows["backwards"], rows["zero_gradient"], rising & ~success,
            ]
        ).tolist()  # fmt: skip
        distances, scores = distance.tolist(), rows["best_score"].tolist()
        parts = [[row[n * self.unit : (n + 1) * self.unit] for row in table] for n in range(len(owners))]
        for owner, (_, _, _, _, found, _, forwards, backwards, zero, rises) in zip(owners, parts, strict=True):
            owner.case.note(found, forwards, backwards, zero, rises)
        for number, (owner, part) in enumerate(zip(owners, parts, strict=True)):
            case, (hit, prediction, found_at, queries, found, finished, *_) = owner.case, part
            if case.is_cancelled(owner.attempt):  # by another of this very batch
                continue
            if self.unit == 1 and found[0] and not hit[0] and attack.keeps == "first":
                self._go_on(owner, self._unit_of(rows, number), bool(finished[0]))
                continue
            one = slice(number * self.unit, (number + 1) * self.unit)
            steps = [(at if at >= 0 else asked) if yes else -1 for yes, at, asked in zip(hit, found_at, queries, strict=True)]
            score = scores[one][0] if attack.keeps == "best" else 0.0
            tried = Tried(
                case.stage, owner.attempt, score, points[one], [bool(yes) for yes in hit], prediction, distances[one], steps
            )
            self._settle(case, tried)

    def _go_on(self, owner: Owner, row: Rows, finished: bool) -> None:
        """A success that full precision does not confirm: the attempt continues where it was, or is asked for its last point."""
        row["found"], row["over"] = torch.zeros_like(row["found"]), torch.zeros_like(row["over"])
        row["forwards"], row["backwards"] = torch.zeros_like(row["forwards"]), torch.zeros_like(row["backwards"])
        if finished:
            row["candidate"] = row["point"]
            self.leaving.append(([owner], row))
        else:
            self.lanes[owner.case.attack].returning.append((owner, row))

    def _settle(self, case: Case, tried: Tried) -> None:
        lane = self.lanes[case.attack]
        if case.settle(tried):
            self._drop_cancelled(case, lane)
        if not case.stage_is_over:
            if not case.running:
                lane.ready.append(case)
            return
        if case.next_stage():
            self.emit(case, False)
            self.lanes[case.attack].ready.append(case)
        else:
            self.emit(case, True)
