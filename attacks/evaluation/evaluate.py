"""Attack a model over a data set and report what held."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.budget import Budget
from ironmoe.attacks.engine.job import Job, Stage
from ironmoe.attacks.engine.queue import Chunk, Engine, Resumed
from ironmoe.attacks.engine.records import Record, Records, records_of
from ironmoe.attacks.engine.run import check_groups
from ironmoe.attacks.evaluation.checksum import checksum, model_digest
from ironmoe.attacks.evaluation.describe import describe_attack
from ironmoe.attacks.evaluation.journal import Journal
from ironmoe.attacks.evaluation.model_checks import (
    Flag,
    check_model,
    no_room_for_checks,
    passes_of_checks,
)
from ironmoe.attacks.evaluation.outcome_checks import check_outcome
from ironmoe.attacks.evaluation.progress import Progress
from ironmoe.attacks.evaluation.report import AttackSummary, RobustnessReport
from ironmoe.attacks.evaluation.sharding import Shard, current_shard
from ironmoe.attacks.evaluation.source import Batches, Source

BEAT_SECONDS = 1.0


def evaluate(
    model: Model,
    data: Batches,
    attacks: Mapping[str, Attack] | Sequence[Attack],
    *,
    eps: Sequence[float] | None = None,
    batch_size: int = 256,
    keep_adversarial: bool = False,
    checks: bool = True,
    journal: Path | str | None = None,
    max_forwards: int | None = None,
    max_seconds: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> RobustnessReport:
    """Run every attack on every example, all in one queue.

    Under ``torchrun`` (an initialised ``torch.distributed``) each process takes its share of the
    examples, and each returns the whole report. What is found does not depend on batches, on the
    number of processes or on interruptions; on CPU only as far as the rounding of products of
    another batch size does not decide.

    Args:
        model: the model the attacks were made for; named again so that no report mixes two models.
        data: (images (N, …), labels (N,)); or an iterable of such batches, such as a DataLoader
            that gives the same order each time. It is gone through once and never held as a whole;
            batches go to the device of the model's weights.
        attacks: name → attack, each with a single eps; or a list of attacks, named by what they
            print, and by a number where that is the same.
        eps: radii for every attack, in place of its own. An image that falls at one is not attacked
            at larger ones: it lies in them.
        batch_size: images in the active batch. Images of models that couple them (a capacity) stay
            together in whole groups; where a group is the whole batch, this is it.
        keep_adversarial: keep the final images in the report; NaN where a budget left an image
            undecided.
        checks: look at the model first, and at the outcome, for signs of false security:
            ``report.checks``.
        journal: a folder; what is found is appended there at once, and the same call goes on where
            it was interrupted. It is refused with another model, attack (every setting counts),
            image or label; callables are told by name.
        max_forwards, max_seconds: end before more forward passes of single images, or time, are
            spent (in this call, checks included; with several processes each has an equal share).
            What is not decided is counted in the report, and so are images that were not reached,
            if the length of the data is known.
        on_progress: called as images are decided, and about every second while none is.

    Raises:
        ValueError: no attack, an attack for another model, no data, or a bad input (see
            ``Attack.run``).
        TypeError: attacks, radii or data that are no such thing.
        JournalError: the folder is the journal of another evaluation, or another process writes to
            it.
    """
    attacks = _named(attacks)
    _check_attacks(model, attacks, batch_size)
    chains = [_chain(attack, eps) for attack in attacks.values()]
    shard = current_shard()
    units = [attack.images_per_unit(batch_size) for attack in attacks.values()]
    for chain, unit in zip(chains, units, strict=True):
        check_groups(chain, unit)
    budget = Budget(None if max_forwards is None else shard.share(max_forwards), max_seconds)
    source = Source(data, list(attacks.values()), batch_size, math.lcm(*units), shard)
    notes: Journal | None = None
    if journal is not None:
        settings = {
            "attacks": {name: describe_attack(attack) for name, attack in attacks.items()},
            "eps": None if eps is None else sorted({float(e) for e in eps}),
            "model": model_digest(model),
            "units": units,
            "keep_adversarial": keep_adversarial,
        }
        notes = Journal(Path(journal), settings, shard.rank)
    run = _Evaluation(
        source,
        attacks,
        chains,
        units,
        shard,
        budget,
        batch_size,
        keep_adversarial,
        notes,
        on_progress,
    )
    try:
        with borrowed(model):
            flags = run.go(checks)
    finally:
        if notes is not None:
            notes.close()
    if not source.seen:
        raise ValueError("data must hold at least one example, got none")
    return run.report(flags, checks)


class _Evaluation:
    """The source, the engine and the records of one evaluation."""

    def __init__(
        self,
        source: Source,
        attacks: Mapping[str, Attack],
        chains: list[list[Stage]],
        units: list[int],
        shard: Shard,
        budget: Budget,
        batch_size: int,
        keep: bool,
        journal: Journal | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.attacks, self.chains, self.units, self.shard, self.budget = (
            attacks,
            chains,
            units,
            shard,
            budget,
        )
        self.batch_size, self.keep, self.journal, self.on_progress = (
            batch_size,
            keep,
            journal,
            on_progress,
        )
        self.records = journal.records if journal is not None else Records()
        self.images: dict[tuple[int, int], Tensor] = {}
        self.source = source
        self.decided = self.fresh = 0
        self.told = time.monotonic()
        self.attacks_began, self.seconds = time.perf_counter(), 0.0
        self.engine: Engine | None = None
        self.spent_on_checks = 0
        self.complete = True
        self.checksums: dict[int, int] = {}
        self.earlier: dict[tuple[int, int], Record] = {}

    def go(self, checks: bool) -> list[Flag]:
        """Everything; returns what the look at the model says."""
        chunks = map(self._noted, self.source)
        first = next(chunks, None)
        flags = self._look(first) if first is not None and checks else []
        self.engine = Engine(
            self.chains,
            self._take,
            batch_size=self.batch_size,
            units=self.units,
            budget=self.budget,
            resume=self._resume,
            device=self.source.device,
            beat=self._beat,
        )
        self.attacks_began = time.perf_counter()
        self.complete = self.engine.run(itertools.chain([] if first is None else [first], chunks))
        self.seconds = time.perf_counter() - self.attacks_began
        return flags

    def _look(self, first: Chunk) -> list[Flag]:
        """The checks of the model, if the budget has room for them."""
        attack, *others = self.attacks.values()
        images = first.images[: self.batch_size].to(attack.attacked_model.image_dtype)
        if not self.budget.allows(0, passes_of_checks(len(images))):
            return [no_room_for_checks()]
        before = attack.attacked_model.forwards
        flags = check_model(attack, images, first.labels[: self.batch_size], also=others)
        self.spent_on_checks = attack.attacked_model.forwards - before
        if self.budget.max_forwards is not None:
            self.budget.max_forwards -= self.spent_on_checks
        return flags

    def _noted(self, chunk: Chunk) -> Chunk:
        """The chunk, found to be what the journal is about."""
        if self.journal is not None:
            for index, image, label in zip(
                chunk.indices.tolist(), chunk.images, chunk.labels, strict=True
            ):
                self.checksums[index] = checksum(image, checksum(label))
                self.journal.check(index, self.checksums[index])
        return chunk

    def _resume(self, attack: int, indices: list[int]) -> Resumed | None:
        """The stage that a unit goes on with, and what of it fell before; None if nothing is left
        to do."""
        records = [self.records.get(attack, index) for index in indices]
        known = [record for record in records if record is not None]
        if len(known) < len(indices):
            return Resumed(0, [False] * len(indices))
        if all(record.decided for record in known):
            self.decided += len(indices)
            return None
        self.earlier |= {(attack, record.example): record for record in known}
        stage = min(max(record.passed for record in known), len(self.chains[attack]) - 1)
        return Resumed(stage, [bool(record.fell) and record.passed < stage for record in known])

    def _take(self, job: Job, final: bool) -> None:
        records = list(records_of(job, final))
        for one, record in enumerate(records):
            before = self.earlier.get((record.attack, record.example))
            if before is not None:
                costs = {
                    "forwards": record.forwards + before.forwards,
                    "backwards": record.backwards + before.backwards,
                    "found": record.found | before.found,
                    "zero_gradient": record.zero_gradient | before.zero_gradient,
                    "loss_rising": (record.loss_rising | before.loss_rising) & (not record.fell),
                }
                fell_before = job.fell_before[one]
                records[one] = (before if fell_before else record)._replace(**costs, decided=final)
        # What fell is over for an image; what holds, once its unit is done. Its image is then
        # final.
        images: list[Tensor | None] = [None] * len(records)
        for one, outcome in enumerate(job.outcomes):
            if self.keep and not job.fell_before[one] and (final or records[one].fell):
                images[one] = job.images[one] if outcome is None else outcome.point
        if self.journal is not None:
            self.journal.append(
                records, [self.checksums[record.example] for record in records], images
            )
        else:
            for record, image in zip(records, images, strict=True):
                self.records.add(record)
                if image is not None:
                    self.images[record.attack, record.example] = image.cpu()
        if final:
            self.decided += len(records)
            self.fresh += len(records)
            self._tell()

    def _beat(self) -> None:
        """Tell how far it is although nothing was decided for a while: the time left grows."""
        if time.monotonic() - self.told > BEAT_SECONDS:
            self._tell()

    def _tell(self) -> None:
        if self.on_progress is not None:
            self.told = time.monotonic()
            self.on_progress(self._progress())

    def _progress(self) -> Progress:
        total = (
            None
            if self.source.examples is None
            else self.shard.share(self.source.examples) * len(self.chains)
        )
        spent = self.spent_on_checks + (self.engine.spent if self.engine is not None else 0)
        return Progress(
            self.decided,
            total,
            len(self.chains),
            self.fresh,
            time.perf_counter() - self.attacks_began,
            spent,
        )

    def report(self, flags: list[Flag], checks: bool) -> RobustnessReport:
        """Of all processes together."""
        records = self.shard.gather(self.records)
        # A kill in the middle of an admission may leave an image known to some attacks only: it
        # counts once all know it.
        known = [
            set(records.of_attack(number)["example"].tolist())
            for number in range(len(self.attacks))
        ]
        common = torch.tensor(sorted(set.intersection(*known)), dtype=torch.int64)
        common = common if self.source.examples is None else common[common < self.source.examples]
        complete = all(self.shard.gather_objects(self.complete))
        # a process without images has none
        flags = next(filter(None, self.shard.gather_objects(flags)), [])
        self.images = {
            key: image
            for part in self.shard.gather_objects(self.images)
            for key, image in part.items()
        }
        summaries = {
            name: self._summary(records, number, common) for number, name in enumerate(self.attacks)
        }
        clean = next(iter(summaries.values())).clean_correct
        unread = 0 if self.source.examples is None else self.source.examples - len(clean)
        report = RobustnessReport(clean, summaries, flags, self.seconds, complete, unread)
        if checks:
            report.checks = flags + check_outcome(report)
        return report

    def _summary(self, records: Records, number: int, examples: Tensor) -> AttackSummary:
        columns = records.of_attack(number, examples)
        flag = {name: columns[name].bool() for name in ("zero_gradient", "loss_rising")}
        adversarial = None
        if self.keep:
            images = [self._image(number, index, records) for index in columns["example"].tolist()]
            adversarial = (
                torch.stack(images)
                if images
                else torch.zeros(0, *self.source.shape, dtype=self.source.dtype)
            )
        return AttackSummary(
            stages=tuple((_radius(stage), stage.attack.name) for stage in self.chains[number]),
            examples=columns["example"],
            **{
                name: columns[name].bool() for name in ("clean_correct", "fell", "decided", "found")
            },
            **{name: columns[name] for name in ("passed", "prediction", "distance", "steps")},
            adversarial=adversarial,
            flags=flag,
            forwards=int(columns["forwards"].sum()),
            backwards=int(columns["backwards"].sum()),
        )

    def _image(self, attack: int, index: int, records: Records) -> Tensor:
        if (attack, index) in self.images:
            return self.images[attack, index]
        record = records.get(attack, index)
        image = (
            None
            if record is None or self.journal is None
            else self.journal.image(record, self.source.shape, self.source.dtype)
        )
        return (
            torch.full(self.source.shape, float("nan"), dtype=self.source.dtype)
            if image is None
            else image
        )


def _named(attacks: Mapping[str, Attack] | Sequence[Attack]) -> Mapping[str, Attack]:
    if isinstance(attacks, Mapping):
        return attacks
    if not isinstance(attacks, Sequence):
        raise TypeError(
            f"attacks must be name → attack, or a list of attacks, got {type(attacks).__name__}"
        )
    named: dict[str, Attack] = {}
    for attack in attacks:
        name = ", ".join(filter(None, (repr(attack), attack.search)))
        alike = sum(known == name or known.startswith(f"{name} (") for known in named)
        named[f"{name} ({alike + 1})" if alike else name] = attack
    return named


def _check_attacks(model: Model, attacks: Mapping[str, Attack], batch_size: int) -> None:
    if not attacks:
        raise ValueError("attacks must hold at least one attack, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for name, attack in attacks.items():
        if not isinstance(attack, Attack):
            raise TypeError(f"attacks[{name!r}] must be an attack, got {type(attack).__name__}")
        if attack.model is not model:
            raise ValueError(
                f"attacks[{name!r}] must be made for the model that is evaluated, got one for "
                "another model"
            )
        if isinstance(attack.eps, Tensor) and attack.eps.ndim:
            raise ValueError(f"attacks[{name!r}] must have a single eps, got one an example")
    bounds = {name: attack.bounds for name, attack in attacks.items()}
    if len(set(bounds.values())) > 1:
        raise ValueError(f"attacks must have the same bounds, got {bounds}")


def _chain(attack: Attack, eps: Sequence[float] | None) -> list[Stage]:
    if eps is not None and not isinstance(eps, Sequence | Tensor):
        raise TypeError(f"eps must be a list of radii, or None for each attack's own, got {eps!r}")
    radii = [float(attack.eps)] if eps is None else sorted({float(e) for e in eps})
    if not radii or not all(radius >= 0 for radius in radii):
        raise ValueError(f"eps must hold at least one radius, none below 0, got {eps}")
    return [Stage(stage, radius) for radius in radii for stage in attack.stages]


def _radius(stage: Stage) -> float:
    assert stage.eps is not None
    return stage.eps
