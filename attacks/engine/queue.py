"""The engine: one queue over images × attacks × eps × targets × restarts.

Each attack has a lane, a batch that stays full: what is finished leaves, the next enters, inside
the run. An image moves on to the next stage of its chain when the attempts of one have failed. The
lane furthest down that can be filled runs first, so that few images are on their way at once,
however large the data set.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.engine.active_batch import Lane, Owner
from ironmoe.attacks.engine.attacked_model import check_labels
from ironmoe.attacks.engine.attempts import Rows, joined, select, where
from ironmoe.attacks.engine.budget import Budget
from ironmoe.attacks.engine.coupling import images_per_unit
from ironmoe.attacks.engine.job import Case, Outcome, Stage

FLAGS_READ_EVERY = 8  # rounds on a GPU; on CPU looking costs nothing
FREE_UP_TO = {"cpu": 16, "cuda": 128}  # units that cost hardly more than one


class Chunk(NamedTuple):
    """n images from the data: images (n, …), labels (n,), indices (n,) int64, eps (n,) float64 or
    None."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    eps: Tensor | None = None


class Resumed(NamedTuple):
    """Where a case begins: its stage, and which of its images fell at an earlier one. None left:
    decided."""

    stage: int
    fell: list[bool]


class Leaving(NamedTuple):
    """Units of a lane whose candidates are to be predicted in full precision."""

    lane: Lane
    owners: list[Owner]
    rows: Rows

    @property
    def images(self) -> int:
        return len(self.owners) * self.lane.unit

    def part(self, places: list[int]) -> "Leaving":
        """These of its units."""
        unit = self.lane.unit
        rows = [place * unit + one for place in places for one in range(unit)]
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.rows["label"].device)
        return Leaving(
            self.lane, [self.owners[place] for place in places], select(self.rows, chosen)
        )


class Engine:
    """Runs every image of a source through chains of attacks.

    Args:
        chains: each a sequence of stages that an image goes through until it falls. Equal attacks
            share a lane.
        units: of each chain, images that must stay together, side by side in the source; what a
            chunk has left over, which only the last may have, makes a smaller unit.
        batch_size: images a lane holds at most.
        emit: called with (case, decided) when a case begins, when it has passed a stage, when it is
            decided, and when the budget leaves it undecided.
        resume: (chain, the numbers of a unit's images) → where to begin; None: nothing to do.
        beat: called after every look at the flags, whether or not anything is decided.
    """

    def __init__(
        self,
        chains: Sequence[Sequence[Stage]],
        emit: Callable[[Case, bool], None],
        *,
        batch_size: int,
        units: Sequence[int],
        budget: Budget | None = None,
        resume: Callable[[int, list[int]], Resumed | None] | None = None,
        device: torch.device | None = None,
        beat: Callable[[], None] | None = None,
    ) -> None:
        self.beat = beat or (lambda: None)
        self.chains, self.emit, self.units, self.batch_size = chains, emit, units, batch_size
        self.budget, self.resume = (
            budget or Budget(),
            resume or (lambda chain, numbers: Resumed(0, [False] * len(numbers))),
        )
        self.kind = "cpu" if device is None else device.type
        attacks = list(dict.fromkeys(stage.attack for chain in chains for stage in chain))
        self.order = {attack: place for place, attack in enumerate(attacks)}
        # by attack and images of a unit, in the order of the chains
        self.lanes: dict[tuple[Attack, int], Lane] = {}
        self.victims = list(dict.fromkeys(attack.victim for attack in attacks))
        self.spent_before = self._forwards()
        self.leaving: list[Leaving] = []
        self.clean_logits_wanted = max((a.targets for a in attacks), default=0)

    @property
    def spent(self) -> int:
        """Forward passes of single images so far."""
        return self._forwards() - self.spent_before

    def run(self, source: Iterable[Chunk]) -> bool:
        """All of the source; False if the budget ended it before."""
        for victim in self.victims:
            victim.forget()
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
            enough = self._waiting >= (
                self.batch_size if lane is None else min(self.batch_size, lane.size * lane.unit)
            )
            if self.leaving and (
                lane is None or enough or self._waiting * 4 >= lane.active * lane.unit
            ):
                if not self._verify():
                    return self._stop()
                continue
            if lane is None:
                return True
            self.beat()
            lane.fill(draining=chunks is None, at_most=self._affordable(lane))
            if not lane.active or not self._rounds(lane):
                return self._stop()

    def _rounds(self, lane: Lane) -> bool:
        """As many as go without a look at the flags; False if the budget ended them."""
        for _ in range(1 if self.kind == "cpu" else FLAGS_READ_EVERY):
            rows = len(lane.owners) * lane.unit
            if not self.budget.allows(self.spent, rows * (lane.passes + 1) + self._waiting):
                self._collect(lane)
                return False
            if lane.has_questions:
                lane.round()
        self._collect(lane)
        return True

    def _affordable(self, lane: Lane) -> int | None:
        """New attempts that may begin, where that takes a pass of each image: none whose first
        question could not be asked."""
        if not lane.records or self.budget.max_forwards is None:
            return None
        at_work = lane.active * lane.unit * (lane.passes + 1) + self._waiting
        return max(
            0, int(self.budget.left(self.spent) - at_work) // (lane.unit * (lane.passes + 2))
        )

    def _stop(self) -> bool:
        """The candidates that are known are still predicted, as far as the number of forwards
        allows; the rest is undecided."""
        self.budget.max_seconds = None
        while self.leaving and self._verify():
            pass
        undecided = [owner.case for item in self.leaving for owner in item.owners]
        for item in self.leaving:
            for place, owner in enumerate(item.owners):
                owner.case.note_cost(item.part([place]).rows)
        for lane in self.lanes.values():
            undecided += lane.stop()
        for case in dict.fromkeys(undecided):
            self.emit(case, False)
        return False

    def _fullest_downstream(self) -> Lane | None:
        return next(
            (lane for lane in reversed(self.lanes.values()) if lane.load >= lane.size), None
        )

    def _upstream_with_work(self) -> Lane | None:
        return next((lane for lane in self.lanes.values() if lane.load), None)

    @property
    def _waiting(self) -> int:
        """Images whose candidates are to be predicted."""
        return sum(item.images for item in self.leaving)

    def _lane_of(self, case: Case) -> Lane:
        """That of its stage; made when it is first needed."""
        key = case.attack, len(case.labels)
        if key not in self.lanes:
            size = max(1, self.batch_size // key[1])
            self.lanes[key] = Lane(
                case.attack, size, key[1], self.kind != "cpu", FREE_UP_TO.get(self.kind, 16)
            )
            self.lanes = dict(
                sorted(self.lanes.items(), key=lambda item: (self.order[item[0][0]], -item[0][1]))
            )
        return self.lanes[key]

    def _forwards(self) -> int:
        return sum(victim.forwards for victim in self.victims)

    def _admit(self, chunk: Chunk) -> bool:
        """Predict the clean images of what is not decided, and queue it; False if the budget
        forbids."""
        count, numbers = len(chunk.labels), chunk.indices.tolist()
        begins = [
            (chain, slice(first, first + unit), begin)
            for chain, unit in enumerate(self.units)
            for first in range(0, count, unit)
            if (begin := self.resume(chain, numbers[first : first + unit])) is not None
        ]
        logits = self._clean_logits(chunk, [one for _, one, _ in begins])
        if logits is None:
            return not begins
        check_labels(chunk.labels, logits)
        if self.clean_logits_wanted and logits.shape[1] < 2:
            raise ValueError(
                "model must have at least 2 classes for an attack with targets, got "
                f"{logits.shape[1]}"
            )
        ranked = logits.topk(min(self.clean_logits_wanted + 1, logits.shape[1]), dim=1).indices
        # The label moves to the end, and off it if it was not among them.
        others = ranked.gather(
            1, (ranked == chunk.labels.unsqueeze(1)).to(torch.int8).argsort(dim=1, stable=True)
        )[:, :-1]
        possible = logits.gather(1, others) > float("-inf")
        prediction, labels = logits.argmax(1).tolist(), chunk.labels.tolist()
        classes = [
            one[:there]
            for one, there in zip(
                others.tolist(), possible.sum(1).clamp_min(1).tolist(), strict=True
            )
        ]
        eps = None if chunk.eps is None else chunk.eps.tolist()
        right = [
            (~chain[0].attack.fooled(logits, {"label": chunk.labels})).tolist()
            for chain in self.chains
        ]
        for number, one, begin in begins:
            chain = self.chains[number]
            case = Case(
                number, chain, chunk.images[one], labels[one], numbers[one], right[number][one],
                prediction[one], classes[one],
                None if eps is None else eps[one], chain[begin.stage].attack.joint, begin.stage,
                begin.fell,
            )  # fmt: skip
            attacked = any(case.wanted) or case.attack.attacks_wrong
            self.emit(case, not attacked)
            if attacked:
                self._lane_of(case).ready.append(case)
        return True

    def _clean_logits(self, chunk: Chunk, wanted: list[slice]) -> Tensor | None:
        """(n, C), right in the wanted places; groups of images that influence each other are
        predicted as they are attacked. None: nothing is wanted, or the budget forbids."""
        attack, count = self.chains[0][0].attack, len(chunk.labels)
        group = images_per_unit(attack.model, self.batch_size)
        asked = torch.zeros(count, dtype=torch.bool)
        for one in wanted:
            asked[one.start // group * group : -(-min(one.stop, count) // group) * group] = True
        places, whole = asked.nonzero().squeeze(1).to(chunk.labels.device), count // group * group
        if not len(places) or not self.budget.allows(self.spent, len(places) + self._waiting):
            return None
        together = max(1, self.batch_size // group) * group
        parts = [*places[places < whole].split(together), places[places >= whole]]
        answers = torch.cat(
            [attack.victim.predict(chunk.images[part]) for part in parts if len(part)]
        )
        return answers.new_zeros(count, answers.shape[1]).index_copy(0, places, answers)

    def _collect(self, lane: Lane) -> None:
        """Units that are over leave; their candidates wait for the prediction that counts."""
        left = lane.harvest()
        if left is None:
            return
        owners, rows = left
        point = rows["point"]
        if lane.attack.keeps != "last":
            kept = torch.ones_like(rows["found"]) if lane.keeps_best else rows["found"]
            point = torch.where(kept.view(-1, *(1,) * (point.ndim - 1)), rows["candidate"], point)
        rows["candidate"] = point
        self.leaving.append(Leaving(lane, owners, rows))

    def _verify(self) -> bool:
        """Predict the candidates of one lane in full precision and settle their attempts; False if
        the budget forbids."""
        lane = self.leaving[0].lane
        same = [item for item in self.leaving if item.lane is lane]
        while len(same) > 1 and sum(len(item.owners) for item in same) > lane.size:
            same.pop()
        candidates = Leaving(
            lane,
            [owner for item in same for owner in item.owners],
            joined([item.rows for item in same]),
        )
        if not self.budget.allows(self.spent, candidates.images):
            return False
        taken = {id(item) for item in same}
        self.leaving = [item for item in self.leaving if id(item) not in taken]
        rows, attack, unit = candidates.rows, lane.attack, lane.unit
        ball = attack.ball(rows)
        points = ball.tighten(rows["candidate"])
        logits = attack.victim.predict(points)
        distance = ball.distance(points)
        success = attack.fooled(logits, rows) & rows["clean_correct"] & (distance <= rows["eps"])
        rising = attack.gradient & (
            rows["loss_best"] - rows["loss_late"] > 0.05 * (rows["loss_best"] - rows["loss_first"])
        )
        again = rows["found"] & ~success & (attack.keeps == "first") & (not lane.keeps_best)
        table = torch.stack(
            [
                success, logits.argmax(1), rows["found_at"], rows["queries"], rows["found"],
                rows["forwards"] + 1,
                rows["backwards"], rows["zero_gradient"], rising & ~success, again,
            ]
        ).tolist()  # fmt: skip
        distances, scores = distance.tolist(), rows["best_score"].tolist()
        parts = [
            [row[n * unit : (n + 1) * unit] for row in table] for n in range(len(candidates.owners))
        ]
        for owner, (_, _, _, _, found, forwards, backwards, zero, rises, _) in zip(
            candidates.owners, parts, strict=True
        ):
            owner.case.note(found, forwards, backwards, zero, rises)
        for number, (owner, part) in enumerate(zip(candidates.owners, parts, strict=True)):
            case, (hit, prediction, found_at, queries, *_, unconfirmed) = owner.case, part
            if case.is_cancelled(owner.attempt):  # by another of this very batch
                continue
            if any(unconfirmed):
                self._go_on(candidates.part([number]), success[number * unit : (number + 1) * unit])
                continue
            outcomes = [
                Outcome(
                    case.stage, owner.attempt, scores[row] if attack.keeps == "best" else 0.0,
                    points[row], bool(hit[one]),
                    prediction[one], distances[row],
                    (found_at[one] if found_at[one] >= 0 else queries[one]) if hit[one] else -1,
                )
                for one, row in enumerate(range(number * unit, (number + 1) * unit))
            ]  # fmt: skip
            self._settle(case, lane, outcomes)
        return True

    def _go_on(self, item: Leaving, confirmed: Tensor) -> None:
        """Successes of a unit that full precision does not confirm: they continue where they were,
        or are asked for their last point."""
        rows = item.rows
        again = rows["found"] & ~confirmed
        last = again & rows["finished"]
        rows["found"], rows["over"] = rows["found"] & confirmed, rows["over"] & (last | ~again)
        rows["found_at"] = rows["found_at"].masked_fill(again, -1)
        rows["candidate"] = where(last, rows["point"], rows["candidate"])
        rows["forwards"], rows["backwards"] = (
            torch.zeros_like(rows["forwards"]),
            torch.zeros_like(rows["backwards"]),
        )
        if bool(rows["over"].all()):
            self.leaving.append(item)
        else:
            item.lane.returning.append((item.owners[0], rows))

    def _settle(self, case: Case, lane: Lane, outcomes: list[Outcome]) -> None:
        if case.settle(outcomes):
            self._drop_cancelled(case, lane)
        if not case.stage_is_over:
            if not case.running:
                lane.ready.append(case)
        elif case.next_stage():
            self.emit(case, False)
            self._lane_of(case).ready.append(case)
        else:
            self.emit(case, True)

    def _drop_cancelled(self, case: Case, lane: Lane) -> None:
        """Its later attempts, wherever they are."""
        lane.drop_cancelled(case)
        for number, item in enumerate(self.leaving):
            gone = [
                owner.case is case and case.is_cancelled(owner.attempt) for owner in item.owners
            ]
            for place in (place for place, cancelled in enumerate(gone) if cancelled):
                case.note_cost(item.part([place]).rows)
            if any(gone):
                self.leaving[number] = item.part(
                    [place for place, cancelled in enumerate(gone) if not cancelled]
                )
        self.leaving = [item for item in self.leaving if item.owners]
