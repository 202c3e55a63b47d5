"""The engine: one queue over images × attacks × eps × targets × restarts.

Each attack has an active batch that stays full: what is finished leaves, and the next enters while
the attack runs. A job moves on to the next stage of its chain when the attempts of one have failed.
The active batch nearest to the end of the chains that can be filled runs first, so that few images
are under way at once, however large the data set.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from ironmoe.attacks.engine.active_batch import ActiveBatch
from ironmoe.attacks.engine.admission import Admission, Resumed, from_the_start
from ironmoe.attacks.engine.attempts import joined
from ironmoe.attacks.engine.budget import Budget
from ironmoe.attacks.engine.counters import passes_of
from ironmoe.attacks.engine.inputs import Chunk
from ironmoe.attacks.engine.job import AttemptEnd, Job, Stage
from ironmoe.attacks.engine.judging.finite import not_finite, not_finite_under
from ironmoe.attacks.engine.judging.judge import Judge
from ironmoe.attacks.engine.search import Search
from ironmoe.attacks.engine.verification import (
    Candidates,
    of_first_batch,
    verify,
    without_cancelled,
)

# On a GPU the host reads after so many rounds which attempts are over; on CPU after every round,
# since reading costs nothing there.
FLAGS_READ_EVERY = 8
# Up to so many units cost hardly more than one.
FREE_UP_TO = {"cpu": 16, "cuda": 128}


class Engine:
    """Runs every image of a source through chains of attacks.

    Args:
        chains: each a sequence of stages that an image goes through until it falls. Equal attacks
            share an active batch.
        emit: called with (job, decided) when a job begins, when it has passed a stage, when it is
            decided, and when the budget leaves it undecided.
        batch_size: images an active batch holds at most.
        unit_sizes: of each chain, how many images must stay together, side by side in the source.
        budget: what the run may cost.
        resume: (chain, the numbers of a unit's images) → where to begin; None: nothing to do.
        device: of the images; a GPU wants batches of few sizes.
        on_look: called after every look at the flags, whether or not anything is decided.
        judge: makes the predictions that count; None: one pass of each attack's own model.
        skips_bad: leave out images for which the model gives nothing finite; else they are an
            error.
    """

    def __init__(
        self,
        chains: Sequence[Sequence[Stage]],
        emit: Callable[[Job, bool], None],
        *,
        batch_size: int,
        unit_sizes: Sequence[int],
        budget: Budget | None = None,
        resume: Callable[[int, list[int]], Resumed | None] | None = None,
        device: torch.device | None = None,
        on_look: Callable[[], None] | None = None,
        judge: Judge | None = None,
        skips_bad: bool = False,
    ) -> None:
        self.emit = emit
        self.judge = judge or Judge()
        self.skips_bad = skips_bad
        self.batch_size = batch_size
        self.budget = budget or Budget()
        self.on_look = on_look or (lambda: None)
        self.kind = "cpu" if device is None else device.type
        self.admission = Admission(
            chains, unit_sizes, batch_size, self.judge, resume or from_the_start
        )

        attacks = list(dict.fromkeys(stage.attack for chain in chains for stage in chain))
        for attack in attacks:
            if not hasattr(attack, "max_queries"):
                raise TypeError(
                    f"max_queries must be set by {type(attack).__name__}, to how often an attempt "
                    "that runs to its end asks the model, got none"
                )
        self.order = {attack: place for place, attack in enumerate(attacks)}
        searched = [attack.attacked_model for attack in attacks]
        judging = [self.judge.asked(attack) for attack in attacks]
        self.attacked_models = list(dict.fromkeys(searched + judging))
        self.spent_before = self._forwards()
        # by attack and unit size, in the order of the chains
        self.batches: dict[tuple[Search, int], ActiveBatch] = {}
        self.leaving: list[Candidates] = []
        self.at_work: Search | None = None
        # A success of the search that its own model, asked again, denied.
        self.saw_two_answers = False
        self.saw_denial = False  # of any success, after which the attempt went on

    @property
    def spent(self) -> int:
        """Forward passes of single images so far."""
        return self._forwards() - self.spent_before

    def run(self, source: Iterable[Chunk]) -> bool:
        """Attack all of the source; False if the budget ended it before."""
        chunks: Iterator[Chunk] | None = iter(source)
        while True:
            batch = self._fullest_downstream()

            if batch is None and chunks is not None:
                chunk = next(chunks, None)
                if chunk is None:
                    chunks = None
                elif not self._admit(chunk):
                    return self._stop()
                continue

            batch = batch or self._upstream_with_work()
            if self._is_time_to_verify(batch):
                if not self._verify():
                    return self._stop()
                continue

            if batch is None:
                return True

            self.on_look()
            if not self._rounds(batch, draining=chunks is None):
                return self._stop()

    def _admit(self, chunk: Chunk) -> bool:
        """Predict the clean images of what is not decided, and queue it; False if the budget
        forbids."""
        beginnings = self.admission.beginnings(chunk)
        if not beginnings:
            return True

        places = self.admission.places_to_predict(chunk, beginnings)
        if not self.budget.allows(self.spent, len(places) * self.admission.passes + self._waiting):
            return False

        judgement = self.admission.judged(chunk, places)
        bad = judgement.bad if chunk.unread is None else judgement.bad & ~chunk.unread
        if not self.skips_bad and bool(bad.any()):
            raise not_finite(chunk.indices[bad].tolist(), len(places), "without any attack")
        for job in self.admission.jobs(chunk, beginnings, judgement):
            if any(job.skipped):
                job.skip(job.skipped)
                self.emit(job, True)
                continue

            is_attacked = any(job.wanted) or job.attack.attacks_wrong
            if not is_attacked:
                job.next_stage()
            self.emit(job, not is_attacked)
            if is_attacked:
                self._batch_of(job).ready.append(job)
        return True

    def _fullest_downstream(self) -> ActiveBatch | None:
        """The active batch nearest to the end of the chains that can be filled."""
        batches = reversed(self.batches.values())
        return next((batch for batch in batches if batch.load >= batch.size), None)

    def _upstream_with_work(self) -> ActiveBatch | None:
        """The first active batch that has anything to do."""
        return next((batch for batch in self.batches.values() if batch.load), None)

    def _batch_of(self, job: Job) -> ActiveBatch:
        """The active batch of the job's present stage, a new one if there is none yet."""
        unit_size = len(job.examples)
        key = job.attack, unit_size

        if key not in self.batches:
            self.batches[key] = ActiveBatch(
                job.attack,
                size=max(1, self.batch_size // unit_size),
                unit_size=unit_size,
                fixed=self.kind != "cpu",
                free_up_to=FREE_UP_TO.get(self.kind, 16),
                goes_on=self.judge.is_another,
            )
            in_order = sorted(self.batches, key=lambda key: (self.order[key[0]], -key[1]))
            self.batches = {key: self.batches[key] for key in in_order}

        return self.batches[key]

    def _rounds(self, batch: ActiveBatch, draining: bool) -> bool:
        """Play rounds until the flags are read again; False if the budget ended them."""
        self.at_work = batch.attack
        in_budget = True
        with batch.timed():
            batch.fill(draining, at_most=self._affordable(batch))
            if not batch.active:
                return False
            for _ in range(1 if self.kind == "cpu" else FLAGS_READ_EVERY):
                images = len(batch.owners) * batch.unit_size
                a_round = images * (batch.passes + self.judge.passes)
                in_budget = self.budget.allows(self.spent, a_round + self._waiting)
                if not in_budget:
                    break
                if batch.has_queries:
                    batch.round()
            self._collect(batch)
        return in_budget

    def _affordable(self, batch: ActiveBatch) -> int | None:
        """How many new attempts may begin, where each begins with a pass of its clean images: none
        whose first query could not be asked. None: any number."""
        if not batch.looks_at_clean_images or self.budget.max_forwards is None:
            return None

        each = batch.unit_size * (batch.passes + self.judge.passes)
        left = int(self.budget.left(self.spent) - batch.active * each - self._waiting)
        return max(0, left // (each + batch.unit_size))

    def _collect(self, batch: ActiveBatch) -> None:
        """Take out the units that are over; their candidates wait for the judge."""
        left = batch.take_finished()
        if left is not None:
            owners, attempts = left
            self.leaving += self._without_bad(Candidates(batch, owners, attempts))

    def _without_bad(self, candidates: Candidates) -> list[Candidates]:
        """The units for which every answer was finite; the others are skipped."""
        bad = candidates.bad_units()
        if not bad:
            return [candidates]

        self._skip(bad, candidates.batch)
        left = without_cancelled([candidates])
        for job in dict.fromkeys(owner.job for owner in candidates.owners):
            if any(job.skipped):
                self.emit(job, True)
        return left

    def _skip(self, units: Sequence[tuple[Job, list[bool]]], batch: ActiveBatch) -> None:
        """Leave out units of which nothing can be said, since some images of each are bad;
        ValueError where that is not wanted."""
        if units and not self.skips_bad:
            raise not_finite_under(units)
        for job, bad in units:
            job.skip(bad)
            self._drop_cancelled(job, batch)

    @property
    def _waiting(self) -> int:
        """How many forward passes the candidates take that wait for the prediction that counts."""
        return sum(item.images for item in self.leaving) * self.judge.passes

    def _is_time_to_verify(self, batch: ActiveBatch | None) -> bool:
        """Whether candidates are predicted before ``batch`` goes on: they fill a batch, they are a
        quarter of what is at work, or nothing else is to do."""
        if not self.leaving:
            return False
        if batch is None:
            return True
        enough = min(self.batch_size, batch.size * batch.unit_size)
        waiting = sum(item.images for item in self.leaving)
        return waiting >= enough or waiting * 4 >= batch.active * batch.unit_size

    def _verify(self) -> bool:
        """Predict the candidates of one active batch again, and settle their attempts; False if the
        budget forbids."""
        same = of_first_batch(self.leaving)
        candidates = Candidates(
            same[0].batch,
            owners=[owner for item in same for owner in item.owners],
            attempts=joined([item.attempts for item in same]),
        )
        if not self.budget.allows(self.spent, candidates.images * self.judge.passes):
            return False

        taken = {id(item) for item in same}
        self.leaving = [item for item in self.leaving if id(item) not in taken]

        verdicts = verify(candidates, self.judge)
        for verdict in verdicts:
            verdict.owner.job.note(verdict.counters)

        # Those that go on come first: then whoever is told of a decision can count them.
        for verdict in sorted(verdicts, key=lambda v: v.goes_on is None or any(v.bad)):
            job = verdict.owner.job
            if job.is_cancelled(verdict.owner.attempt):
                continue  # by another attempt of these very candidates
            if any(verdict.bad):
                self._skip([(job, verdict.bad)], candidates.batch)
                self.emit(job, True)
                continue

            self.saw_two_answers |= verdict.denied
            if verdict.goes_on is not None:
                self._go_on(verdict.goes_on)
            else:
                self._settle(job, candidates.batch, verdict.ends)
        return True

    def _go_on(self, unit: Candidates) -> None:
        """A unit returns to its active batch; if no attempt of it has a query left, its last points
        are predicted."""
        self.saw_denial = True
        if bool(unit.attempts["over"].all()):
            self.leaving.append(unit)
        else:
            unit.batch.returning.append((unit.owners[0], unit.attempts))

    def _settle(self, job: Job, batch: ActiveBatch, ends: list[AttemptEnd]) -> None:
        """Note the end of an attempt. Then the job makes another attempt, goes on to its next
        stage, or is decided."""
        if job.settle(ends):
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
        """Take out the job's needless attempts, wherever they are."""
        batch.drop_cancelled(job)
        self.leaving = without_cancelled(self.leaving, job)

    def _stop(self) -> bool:
        """The budget is spent. Candidates that are known are still predicted, as far as the number
        of forwards allows; the rest is undecided."""
        self.budget.max_seconds = None
        while self.leaving and self._verify():
            pass

        undecided: list[Job] = []
        for item in self.leaving:
            for place, owner in enumerate(item.owners):
                owner.job.note(passes_of(item.part([place]).attempts))
                undecided.append(owner.job)
        for batch in self.batches.values():
            undecided += batch.stop()

        for job in dict.fromkeys(undecided):
            self.emit(job, False)
        return False

    def _forwards(self) -> int:
        return sum(attacked_model.forwards for attacked_model in self.attacked_models)
