"""One evaluation under way: the source, the engine, and the records of what was decided.

It knows the checks and the journal. What the report says of the records, ``summaries`` knows.
"""

import copy
import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.engine.admission import Resumed
from ironmoe.attacks.engine.attacked_model import AttackedModel
from ironmoe.attacks.engine.budget import Budget
from ironmoe.attacks.engine.inputs import Chunk
from ironmoe.attacks.engine.job import Job, Stage
from ironmoe.attacks.engine.judging.judge import Judge
from ironmoe.attacks.engine.judging.passes import PASSES
from ironmoe.attacks.engine.queue import Engine
from ironmoe.attacks.engine.records import Record, Records, records_of
from ironmoe.attacks.evaluation.ahead.falls import Falls
from ironmoe.attacks.evaluation.arguments import name_of, parts_by_name
from ironmoe.attacks.evaluation.checks.model_checks import (
    IMAGES,
    look_at,
    none_made,
    passes_of_checks,
    says_random,
    says_steady,
)
from ironmoe.attacks.evaluation.checks.outcome_checks import check_outcome, two_answers
from ironmoe.attacks.evaluation.checksum import checksums_of
from ironmoe.attacks.evaluation.findings.flag import Flag, combined
from ironmoe.attacks.evaluation.journal import Journal
from ironmoe.attacks.evaluation.progress import Left, Progress, work_left
from ironmoe.attacks.evaluation.report import RobustnessReport
from ironmoe.attacks.evaluation.sharding import Shard
from ironmoe.attacks.evaluation.source import Source
from ironmoe.attacks.evaluation.summaries import (
    FinalImages,
    examples_of_all,
    leave_out_skipped,
    summary_of,
)

TELL_SECONDS = 1.0


@dataclass(kw_only=True)
class Evaluation:
    """The state of one call of ``evaluate``, whose arguments it has.

    Attributes:
        records: what is known of each image under each attack.
        images: (attack, example) → the final image, where there is no journal to keep it.
        decided: how many (image, attack) pairs are settled.
        fresh: how many of these were settled in this call.
        broken: in how many of the fresh pairs the image fell, or was wrong without any attack.
        journal: where results are written; None: they are kept in memory.
        judge: makes the predictions that count.
        target: the model that is evaluated, where the searches run on another one.
        checksums: example → checksum of its image, label and further inputs.
        earlier: (attack, example) → the record of an interrupted run that this one goes on from.
        falls: how images fared in this call under each attack.
        begun: for each attack, how many images have a job, or need none any more.
        known_ahead: for each attack, how many images are decided that have not been read again.
        parts: attack, or part of one → what progress calls it.
        complete: the budget did not end it before everything was decided.
    """

    source: Source
    attacks: Mapping[str, Attack]
    chains: Sequence[Sequence[Stage]]
    unit_sizes: Sequence[int]
    shard: Shard
    budget: Budget
    batch_size: int
    keep_adversarial: bool | str
    passes: int | None
    target: AttackedModel | None
    skips_bad: bool
    on_progress: Callable[[Progress], None] | None
    journal: Journal | None = None
    records: Records = field(default_factory=Records)
    images: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    decided: int = 0
    fresh: int = 0
    broken: int = 0
    checksums: dict[int, int] = field(default_factory=dict)
    earlier: dict[tuple[int, int], Record] = field(default_factory=dict)
    engine: Engine | None = None
    complete: bool = True
    spent_on_checks: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.judge = Judge(self.passes or 1, self.target)
        self.told = time.monotonic()
        self.attacks_began = time.perf_counter()
        self.falls = Falls(self.chains)
        self.begun = [0] * len(self.chains)
        self.known_ahead = [0] * len(self.chains)
        self.parts = parts_by_name(self.attacks)

    def run(self, checks: bool, journal: Callable[[int], Journal] | None) -> list[Flag]:
        """Attack everything; returns what the look at the model says. ``journal`` opens the
        journal, once it is known how many passes a verdict rests on."""
        unread = iter(self.source)
        first = next(unread, None)  # the checks look at the first images
        flags = self._look(first) if first is not None and checks else []

        self.steady = says_steady(flags)
        if self.passes is None and any(self.shard.gather_objects(says_random(flags))):
            self.judge = Judge(PASSES, self.target)
        if journal is not None:
            self.journal = journal(self.judge.passes)
            self.records = self.journal.records
            known = Counter(record.attack for record in self.records if record.decided)
            self.known_ahead = [self.shard.share(known[n]) for n in range(len(self.chains))]
        chunks = map(self._noted, itertools.chain([] if first is None else [first], unread))

        self.engine = Engine(
            self.chains,
            self._take,
            batch_size=self.batch_size,
            unit_sizes=self.unit_sizes,
            budget=self.budget,
            resume=self._resume,
            device=self.source.device,
            on_look=self._tell_sometimes,
            judge=self.judge,
            skips_bad=self.skips_bad,
        )
        self.attacks_began = time.perf_counter()
        self.complete = self.engine.run(chunks)
        self.seconds = time.perf_counter() - self.attacks_began
        return flags

    def report(self, flags: list[Flag], checks: bool) -> RobustnessReport:
        """The report of all processes together."""
        records = self.shard.gather(self.records)
        complete = all(self.shard.gather_objects(self.complete))
        flags = combined(self.shard.gather_objects(flags))
        final = None
        known = (self.source.shape, self.source.dtype)
        # A process that had no images of a stream does not know what they look like.
        shape, dtype = next(filter(lambda one: one[0], self.shard.gather_objects(known)), known)
        if self.keep_adversarial:
            images = {
                key: image
                for part in self.shard.gather_objects(self.images)
                for key, image in part.items()
            }
            final = FinalImages(images, journal=self.journal, shape=shape, dtype=dtype)

        examples = examples_of_all(records, len(self.attacks), self.source.examples)
        checksums = {} if self.journal is None else dict(self.journal.checksums)
        for part in self.shard.gather_objects(self.checksums):
            checksums |= part

        summaries = {
            name: summary_of(
                records,
                number,
                examples,
                stages=self.chains[number],
                passes=self.judge.passes,
                final=final,
                in_memory=self.keep_adversarial is True,
                shape=shape,
                checksums=checksums,
            )
            for number, name in enumerate(self.attacks)
        }
        leave_out_skipped(summaries.values())
        clean = next(iter(summaries.values())).clean_correct
        report = RobustnessReport(
            clean_correct=clean,
            attacks=summaries,
            checks=flags,
            seconds=self.seconds,
            complete=complete,
            search_model=None if self.target is None else name_of(self.source.attacks[0].model),
            unread=0 if self.source.examples is None else self.source.examples - len(clean),
        )
        if checks:
            seen = any(self.shard.gather_objects(self._saw_two_answers))
            doubts = two_answers(report, seen)
            report.checks = [*flags, doubts, *check_outcome(report)]
        return report

    @property
    def _saw_two_answers(self) -> bool:
        return self.engine is not None and self.engine.saw_two_answers

    def _look(self, first: Chunk) -> list[Flag]:
        """The checks of the model, if the budget has room for them."""
        attack, *others = self.attacks.values()
        if self.target is not None:  # the checks are about the model that is evaluated
            attack = copy.copy(attack)
            attack.attacked_model = self.target
        looked_at = first.part(slice(0, min(self.batch_size, IMAGES)))
        images = looked_at.images.to(attack.attacked_model.image_dtype)
        if not self.budget.allows(0, passes_of_checks(len(images))):
            return none_made("max_forwards left no room for a look at the model")

        before = attack.attacked_model.forwards
        columns = {"label": looked_at.labels, **looked_at.side}
        good = torch.ones(len(images), dtype=torch.bool, device=images.device)
        if self.skips_bad:
            good &= ~self.judge(attack, images, columns).bad
        if looked_at.unread is not None:
            good &= ~looked_at.unread
        columns = {name: column[good] for name, column in columns.items()}
        numbers = looked_at.indices[good]
        flags = (
            look_at(attack, images[good], columns, also=others, numbers=numbers)
            if len(numbers)
            else none_made("no image of the first batch could be judged")
        )
        self.spent_on_checks = attack.attacked_model.forwards - before
        if self.budget.max_forwards is not None:
            self.budget.max_forwards -= self.spent_on_checks
        return flags

    def _noted(self, chunk: Chunk) -> Chunk:
        """The chunk, its images noted, and found to be what the journal is about."""
        extra = [column for _, column in sorted(chunk.side.items())]
        found = checksums_of(chunk.images, chunk.labels, *extra)
        for number, each in zip(chunk.indices.tolist(), found, strict=True):
            self.checksums[number] = each
            if self.journal is not None:
                self.journal.check(number, each)
            for attack in range(len(self.chains)):
                record = self.records.get(attack, number)
                self.known_ahead[attack] -= record is not None and record.decided
        return chunk

    def _resume(self, attack: int, examples: list[int]) -> Resumed | None:
        """The stage that a unit goes on with, and which of its images fell before; None if nothing
        is left to do."""
        records = [self.records.get(attack, example) for example in examples]
        known = [record for record in records if record is not None]
        if len(known) < len(examples):
            return Resumed(0, [False] * len(examples))

        if all(record.decided for record in known):
            self.decided += len(examples)
            self.begun[attack] += len(examples)
            return None
        if self.judge.is_patient:
            return Resumed(0, [False] * len(examples))  # its passes were not all written down

        self.earlier |= {(attack, record.example): record for record in known}
        stage = min(max(record.passed for record in known), len(self.chains[attack]) - 1)
        return Resumed(stage, [bool(record.fell) and record.passed < stage for record in known])

    def _take(self, job: Job, final: bool) -> None:
        """Note what the engine knows of a job now."""
        records = [
            self._with_earlier(record, job.examples[one].fell_before, final)
            for one, record in enumerate(records_of(job, final))
        ]
        images = [
            self._final_image(job, one, final or bool(record.fell))
            for one, record in enumerate(records)
        ]
        if self.judge.is_patient:
            records = [record._replace(alike=self.judge.alike) for record in records]
        self._keep(records, images)
        if job not in self.falls.under_way:
            self.begun[job.chain] += len(records)
        self.falls.note(job, final)
        if final:
            self.decided += len(records)
            self.fresh += len(records)
            self.broken += sum(bool(r.fell or not r.clean_correct) for r in records)
            self._tell()

    def _with_earlier(self, record: Record, fell_before: bool, final: bool) -> Record:
        """The record, with what an interrupted run had counted before."""
        before = self.earlier.get((record.attack, record.example))
        if before is None:
            return record
        counters = record.counters.plus(before.counters).with_verdict(bool(record.fell))
        known = before if fell_before else record
        return known._replace(counters=counters, decided=final)

    def _final_image(self, job: Job, one: int, is_final: bool) -> Tensor | None:
        """An image that fell is final at once; one that holds, when its unit is done."""
        if not self.keep_adversarial or not is_final or job.examples[one].fell_before:
            return None
        end = job.ends[one]
        return job.images[one] if end is None else end.point

    def _keep(self, records: list[Record], images: list[Tensor | None]) -> None:
        if self.journal is not None:
            checksums = [self.checksums[record.example] for record in records]
            self.journal.append(records, checksums, images)
            return
        for record, image in zip(records, images, strict=True):
            self.records.add(record)
            if image is not None:
                self.images[record.attack, record.example] = image.cpu()

    def _tell_sometimes(self) -> None:
        """Tell how far it is although nothing was decided for a while: the time left grows."""
        if time.monotonic() - self.told > TELL_SECONDS:
            self._tell()

    def _tell(self) -> None:
        if self.on_progress is not None:
            self.told = time.monotonic()
            self.on_progress(self._progress())

    def _progress(self) -> Progress:
        assert self.engine is not None
        examples = self.source.examples
        seconds = time.perf_counter() - self.attacks_began
        left = {} if examples is None else self._left(self.engine, examples, seconds)._asdict()
        return Progress(
            decided=self.decided,
            total=None if examples is None else self.shard.share(examples) * len(self.chains),
            attacks=len(self.chains),
            fresh=self.fresh,
            seconds=seconds,
            forwards=self.spent_on_checks + self.engine.spent,
            broken=self.broken,
            at_work=self.parts.get(self.engine.at_work, ""),
            **left,
        )

    def _left(self, engine: Engine, examples: int, seconds: float) -> Left:
        share = self.shard.share(examples)
        not_begun = [
            max(0, share - begun - max(0, known))
            for begun, known in zip(self.begun, self.known_ahead, strict=True)
        ]
        unread = max(0, share - len(self.checksums))
        return work_left(engine, not_begun, unread, self.steady, seconds, self.falls)
