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

from ironmoe.attacks.engine.active_batch import ActiveBatch, Owner
from ironmoe.attacks.engine.attacked_model import check_labels
from ironmoe.attacks.engine.attempts import Attempts, joined, select, where
from ironmoe.attacks.engine.budget import Budget
from ironmoe.attacks.engine.coupling import images_per_unit
from ironmoe.attacks.engine.job import Job, Outcome, Stage
from ironmoe.attacks.engine.search import Search

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

    batch: ActiveBatch
    owners: list[Owner]
    attempts: Attempts

    @property
    def images(self) -> int:
        return len(self.owners) * self.batch.unit

    def part(self, places: list[int]) -> "Leaving":
        """These of its units."""
        unit = self.batch.unit
        rows = [place * unit + one for place in places for one in range(unit)]
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.attempts["label"].device)
        return Leaving(
            self.batch, [self.owners[place] for place in places], select(self.attempts, chosen)
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
        emit: Callable[[Job, bool], None],
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
        self.batches: dict[tuple[Search, int], ActiveBatch] = {}
        self.attacked_models = list(dict.fromkeys(attack.attacked_model for attack in attacks))
        self.spent_before = self._forwards()
        self.leaving: list[Leaving] = []
        self.clean_logits_wanted = max((a.targets for a in attacks), default=0)

    @property
    def spent(self) -> int:
        """Forward passes of single images so far."""
        return self._forwards() - self.spent_before

    def run(self, source: Iterable[Chunk]) -> bool:
        """All of the source; False if the budget ended it before."""
        for attacked_model in self.attacked_models:
            attacked_model.forget()
        chunks: Iterator[Chunk] | None = iter(source)
        while True:
            batch = self._fullest_downstream()
            if batch is None and chunks is not None:
                chunk = next(chunks, None)
                chunks = chunks if chunk is not None else None
                if chunk is not None and not self._admit(chunk):
                    return self._stop()
                continue
            batch = batch or self._upstream_with_work()
            enough = self._waiting >= (
                self.batch_size if batch is None else min(self.batch_size, batch.size * batch.unit)
            )
            if self.leaving and (
                batch is None or enough or self._waiting * 4 >= batch.active * batch.unit
            ):
                if not self._verify():
                    return self._stop()
                continue
            if batch is None:
                return True
            self.beat()
            batch.fill(draining=chunks is None, at_most=self._affordable(batch))
            if not batch.active or not self._rounds(batch):
                return self._stop()

    def _rounds(self, batch: ActiveBatch) -> bool:
        """As many as go without a look at the flags; False if the budget ended them."""
        for _ in range(1 if self.kind == "cpu" else FLAGS_READ_EVERY):
            rows = len(batch.owners) * batch.unit
            if not self.budget.allows(self.spent, rows * (batch.passes + 1) + self._waiting):
                self._collect(batch)
                return False
            if batch.has_queries:
                batch.round()
        self._collect(batch)
        return True

    def _affordable(self, batch: ActiveBatch) -> int | None:
        """New attempts that may begin, where that takes a pass of each image: none whose first
        question could not be asked."""
        if not batch.records or self.budget.max_forwards is None:
            return None
        at_work = batch.active * batch.unit * (batch.passes + 1) + self._waiting
        return max(
            0, int(self.budget.left(self.spent) - at_work) // (batch.unit * (batch.passes + 2))
        )

    def _stop(self) -> bool:
        """The candidates that are known are still predicted, as far as the number of forwards
        allows; the rest is undecided."""
        self.budget.max_seconds = None
        while self.leaving and self._verify():
            pass
        undecided = [owner.job for item in self.leaving for owner in item.owners]
        for item in self.leaving:
            for place, owner in enumerate(item.owners):
                owner.job.note_cost(item.part([place]).attempts)
        for batch in self.batches.values():
            undecided += batch.stop()
        for job in dict.fromkeys(undecided):
            self.emit(job, False)
        return False

    def _fullest_downstream(self) -> ActiveBatch | None:
        return next(
            (batch for batch in reversed(self.batches.values()) if batch.load >= batch.size), None
        )

    def _upstream_with_work(self) -> ActiveBatch | None:
        return next((batch for batch in self.batches.values() if batch.load), None)

    @property
    def _waiting(self) -> int:
        """Images whose candidates are to be predicted."""
        return sum(item.images for item in self.leaving)

    def _batch_of(self, job: Job) -> ActiveBatch:
        """That of its stage; made when it is first needed."""
        key = job.attack, len(job.labels)
        if key not in self.batches:
            size = max(1, self.batch_size // key[1])
            self.batches[key] = ActiveBatch(
                job.attack, size, key[1], self.kind != "cpu", FREE_UP_TO.get(self.kind, 16)
            )
            self.batches = dict(
                sorted(self.batches.items(), key=lambda item: (self.order[item[0][0]], -item[0][1]))
            )
        return self.batches[key]

    def _forwards(self) -> int:
        return sum(attacked_model.forwards for attacked_model in self.attacked_models)

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
            job = Job(
                number, chain, chunk.images[one], labels[one], numbers[one], right[number][one],
                prediction[one], classes[one],
                None if eps is None else eps[one], chain[begin.stage].attack.coupled_by_model,
                begin.stage,
                begin.fell,
            )  # fmt: skip
            attacked = any(job.wanted) or job.attack.attacks_wrong
            self.emit(job, not attacked)
            if attacked:
                self._batch_of(job).ready.append(job)
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
            [attack.attacked_model.predict(chunk.images[part]) for part in parts if len(part)]
        )
        return answers.new_zeros(count, answers.shape[1]).index_copy(0, places, answers)

    def _collect(self, batch: ActiveBatch) -> None:
        """Units that are over leave; their candidates wait for the prediction that counts."""
        left = batch.harvest()
        if left is None:
            return
        owners, attempts = left
        point = attempts["point"]
        if batch.attack.keeps != "last":
            kept = torch.ones_like(attempts["found"]) if batch.keeps_best else attempts["found"]
            point = torch.where(
                kept.view(-1, *(1,) * (point.ndim - 1)), attempts["candidate"], point
            )
        attempts["candidate"] = point
        self.leaving.append(Leaving(batch, owners, attempts))

    def _verify(self) -> bool:
        """Predict the candidates of one lane in full precision and settle their attempts; False if
        the budget forbids."""
        batch = self.leaving[0].batch
        same = [item for item in self.leaving if item.batch is batch]
        while len(same) > 1 and sum(len(item.owners) for item in same) > batch.size:
            same.pop()
        candidates = Leaving(
            batch,
            [owner for item in same for owner in item.owners],
            joined([item.attempts for item in same]),
        )
        if not self.budget.allows(self.spent, candidates.images):
            return False
        taken = {id(item) for item in same}
        self.leaving = [item for item in self.leaving if id(item) not in taken]
        attempts, attack, unit = candidates.attempts, batch.attack, batch.unit
        ball = attack.ball(attempts)
        points = ball.tighten(attempts["candidate"])
        logits = attack.attacked_model.predict(points)
        distance = ball.distance(points)
        success = (
            attack.fooled(logits, attempts)
            & attempts["clean_correct"]
            & (distance <= attempts["eps"])
        )
        rising = attack.gradient & (
            attempts["loss_best"] - attempts["loss_late"]
            > 0.05 * (attempts["loss_best"] - attempts["loss_first"])
        )
        again = attempts["found"] & ~success & (attack.keeps == "first") & (not batch.keeps_best)
        table = torch.stack(
            [
                success, logits.argmax(1), attempts["found_at"], attempts["queries"],
                attempts["found"],
                attempts["forwards"] + 1,
                attempts["backwards"], attempts["zero_gradient"], rising & ~success, again,
            ]
        ).tolist()  # fmt: skip
        distances, scores = distance.tolist(), attempts["best_score"].tolist()
        parts = [
            [row[n * unit : (n + 1) * unit] for row in table] for n in range(len(candidates.owners))
        ]
        for owner, (_, _, _, _, found, forwards, backwards, zero, rises, _) in zip(
            candidates.owners, parts, strict=True
        ):
            owner.job.note(found, forwards, backwards, zero, rises)
        for number, (owner, part) in enumerate(zip(candidates.owners, parts, strict=True)):
            job, (hit, prediction, found_at, queries, *_, unconfirmed) = owner.job, part
            if job.is_cancelled(owner.attempt):  # by another of this very batch
                continue
            if any(unconfirmed):
                self._go_on(candidates.part([number]), success[number * unit : (number + 1) * unit])
                continue
            outcomes = [
                Outcome(
                    job.stage, owner.attempt, scores[row] if attack.keeps == "best" else 0.0,
                    points[row], bool(hit[one]),
                    prediction[one], distances[row],
                    (found_at[one] if found_at[one] >= 0 else queries[one]) if hit[one] else -1,
                )
                for one, row in enumerate(range(number * unit, (number + 1) * unit))
            ]  # fmt: skip
            self._settle(job, batch, outcomes)
        return True

    def _go_on(self, item: Leaving, confirmed: Tensor) -> None:
        """Successes of a unit that full precision does not confirm: they continue where they were,
        or are asked for their last point."""
        attempts = item.attempts
        again = attempts["found"] & ~confirmed
        last = again & attempts["finished"]
        attempts["found"], attempts["over"] = (
            attempts["found"] & confirmed,
            attempts["over"] & (last | ~again),
        )
        attempts["found_at"] = attempts["found_at"].masked_fill(again, -1)
        attempts["candidate"] = where(last, attempts["point"], attempts["candidate"])
        attempts["forwards"], attempts["backwards"] = (
            torch.zeros_like(attempts["forwards"]),
            torch.zeros_like(attempts["backwards"]),
        )
        if bool(attempts["over"].all()):
            self.leaving.append(item)
        else:
            item.batch.returning.append((item.owners[0], attempts))

    def _settle(self, job: Job, batch: ActiveBatch, outcomes: list[Outcome]) -> None:
        if job.settle(outcomes):
            self._drop_cancelled(job, batch)
        if not job.stage_is_over:
            if not job.running:
                batch.ready.append(job)
        elif job.next_stage():
            self.emit(job, False)
            self._batch_of(job).ready.append(job)
        else:
            self.emit(job, True)

    def _drop_cancelled(self, job: Job, batch: ActiveBatch) -> None:
        """Its later attempts, wherever they are."""
        batch.drop_cancelled(job)
        for number, item in enumerate(self.leaving):
            gone = [owner.job is job and job.is_cancelled(owner.attempt) for owner in item.owners]
            for place in (place for place, cancelled in enumerate(gone) if cancelled):
                job.note_cost(item.part([place]).attempts)
            if any(gone):
                self.leaving[number] = item.part(
                    [place for place, cancelled in enumerate(gone) if not cancelled]
                )
        self.leaving = [item for item in self.leaving if item.owners]
