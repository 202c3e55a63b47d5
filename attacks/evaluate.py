"""Attack a model over a data set and report what held."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.case import Case, Stage
from ironmoe.attacks.checks import Flag, check_model, check_outcome
from ironmoe.attacks.engine import Budget, Chunk, Engine
from ironmoe.attacks.journal import Journal, checksum, weights_digest
from ironmoe.attacks.progress import Progress
from ironmoe.attacks.records import Record, Records, records_of
from ironmoe.attacks.robustness import AttackSummary, RobustnessReport
from ironmoe.attacks.run import check_groups, prepared
from ironmoe.attacks.sharding import Shard, current_shard
from ironmoe.attacks.state import borrowed
from ironmoe.attacks.victim import Model, check_images

Batches = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


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

    Under ``torchrun`` (an initialised ``torch.distributed``) each process takes its share of the examples, and each returns the whole
    report. What is found does not depend on batches, on the number of processes or on interruptions; on CPU only as far as the
    rounding of products of another batch size does not decide.

    Args:
        model: the model the attacks were made for; named again so that no report mixes two models.
        data: (images (N, …), labels (N,)); or an iterable of such batches, such as a DataLoader that gives the same order each time.
            It is gone through once and never held as a whole; batches go to the device of the model's weights.
        attacks: name → attack, each with a single eps; or a list of attacks, named by what they print.
        eps: radii for every attack, in place of its own. An image that falls at one is not attacked at larger ones: it lies in them.
        batch_size: images in the active batch. Images of models that couple them (a capacity) stay together in whole groups; where
            a group is the whole batch, this is it.
        keep_adversarial: keep the final images in the report.
        checks: look at the model first, and at the outcome, for signs of false security: ``report.checks``.
        journal: a folder; what is found is appended there at once, and the same call goes on where it was interrupted.
        max_forwards, max_seconds: end before more forward passes of single images, or time, are spent (in the whole evaluation; with
            several processes each has an equal share). What is not decided is counted in the report.
        on_progress: called as images are decided.

    Raises:
        ValueError: no attack, an attack for another model, no data, or a bad input (see ``Attack.run``).
        JournalError: the folder is the journal of another evaluation.
    """
    if not isinstance(attacks, Mapping):
        attacks = {", ".join(filter(None, (repr(attack), attack.search))): attack for attack in attacks}
    _check_attacks(model, attacks, batch_size)
    chains = [_chain(attack, eps) for attack in attacks.values()]
    shard = current_shard()
    unit = max(attack.images_per_unit(batch_size) for attack in attacks.values())
    for chain in chains:
        check_groups(chain, unit)
    notes: Journal | None = None
    if journal is not None:
        settings = {
            "attacks": {name: [repr(attack), attack.search] for name, attack in attacks.items()},
            "eps": None if eps is None else [float(e) for e in eps],
            "weights": weights_digest(model),
            "unit": unit,
            "keep_adversarial": keep_adversarial,
        }
        notes = Journal(Path(journal), settings, shard.rank)
    run = _Evaluation(attacks, chains, shard, unit, batch_size, keep_adversarial, notes, on_progress)
    budget = Budget(None if max_forwards is None else shard.share(max_forwards), max_seconds)
    with borrowed(model):
        found_by_checks = run.go(data, budget, checks)
    if notes is not None:
        notes.close()
    if not run.seen:
        raise ValueError("data must hold at least one example, got none")
    return run.report(time.perf_counter() - run.began, found_by_checks if checks else [])


class _Evaluation:
    """The source, the engine and the records of one evaluation."""

    def __init__(
        self,
        attacks: Mapping[str, Attack],
        chains: list[list[Stage]],
        shard: Shard,
        unit: int,
        batch_size: int,
        keep: bool,
        journal: Journal | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.attacks, self.chains, self.shard, self.unit = attacks, chains, shard, unit
        self.batch_size, self.keep, self.journal, self.on_progress = batch_size, keep, journal, on_progress
        self.records = journal.records if journal is not None else Records()
        self.images: dict[tuple[int, int], Tensor] = {}
        self.shape, self.dtype = torch.Size(), torch.float32
        self.device: torch.device | None = None  # of the model; else where the images are
        self.seen = self.decided = self.fresh = self.spent = 0
        self.began = time.perf_counter()
        self.total: int | None = None
        self.engine: Engine | None = None
        self.complete = True
        self.checksums: dict[int, int] = {}
        self.earlier: dict[tuple[int, int], Record] = {}

    def go(self, data: Batches, budget: Budget, checks: bool) -> list[Flag]:
        """Everything; returns what the look at the model says."""
        if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
            self.total = self.shard.share(len(data[1])) * len(self.chains)  # type: ignore[arg-type]
        source = self._units(data)
        first = next(source, None)
        flags: list[Flag] = []
        if first is not None and checks:
            flags = check_model(
                next(iter(self.attacks.values())), first.images[: self.batch_size], first.labels[: self.batch_size]
            )
        parts: list[Chunk] = []

        def whole() -> Iterator[Chunk]:
            """Whole units; a last smaller one is left for later."""
            for chunk in itertools.chain([] if first is None else [first], source):
                full = len(chunk.labels) // self.unit * self.unit
                if full:
                    yield _cut(chunk, slice(0, full))
                if full < len(chunk.labels):
                    parts.append(_cut(chunk, slice(full, None)))

        self.complete = self._engine(self.unit, budget, whole())
        if parts and self.complete:
            self.complete = self._engine(len(parts[0].labels), budget, iter(parts))
        return flags

    def _engine(self, unit: int, budget: Budget, source: Iterator[Chunk]) -> bool:
        self.engine = Engine(
            self.chains,
            self._take,
            batch_size=self.batch_size,
            unit=unit,
            budget=budget,
            begin_at=self._begin_at,
            device=self.device,
        )
        done = self.engine.run(source)
        budget.max_forwards = None if budget.max_forwards is None else budget.max_forwards - self.engine.spent
        self.spent += self.engine.spent
        return done

    def _units(self, data: Batches) -> Iterator[Chunk]:
        """The data in chunks of about a batch, checked, numbered, and only this process's share of it."""
        first, rest = 0, None
        model = next(iter(self.attacks.values())).model
        weight = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        for images, labels in _batches(data, self.batch_size):
            self.device = images.device if weight is None else weight.device
            try:
                check_images(images, labels, next(iter(self.attacks.values())).bounds)
            except (ValueError, TypeError) as error:
                raise type(error)(f"in data {first} … {first + len(images) - 1}: {error}") from error
            for chain in self.chains:
                for stage in chain:
                    stage.attack.victim.image_dtype = images.dtype
            chunk = prepared(images.to(self.device), labels.to(self.device), None, first)
            first += len(images)
            self.seen, self.shape, self.dtype = first, images.shape[1:], chunk.images.dtype
            chunk = chunk if rest is None else Chunk(*(torch.cat(pair) for pair in zip(rest[:3], chunk[:3], strict=True)))  # type: ignore[arg-type]
            full = len(chunk.labels) // self.unit * self.unit
            mine = self.shard.takes(chunk.indices[:full], self.unit)
            rest = _cut(chunk, slice(full, None)) if full < len(chunk.labels) else None
            yield from self._noted(Chunk(*(part[:full][mine] for part in chunk[:3])))
        if rest is not None and bool(self.shard.takes(rest.indices[:1], self.unit).all()):
            yield from self._noted(rest)

    def _noted(self, chunk: Chunk) -> Iterator[Chunk]:
        if not len(chunk.labels):
            return
        if self.journal is not None:
            for index, image in zip(chunk.indices.tolist(), chunk.images, strict=True):
                self.checksums[index] = checksum(image)
                self.journal.check(index, self.checksums[index])
        yield chunk

    def _begin_at(self, attack: int, index: int) -> int:
        """The stage to go on with; an image that is decided begins after the last."""
        record = self.records.get(attack, index)
        if record is None:
            return 0
        if record.decided:
            self.decided += self.unit
            return len(self.chains[attack])
        self.earlier[attack, index] = record
        return record.passed

    def _take(self, case: Case, final: bool) -> None:
        for one, record in enumerate(records_of(case, final)):
            before = self.earlier.get((record.attack, record.example))
            if before is not None:
                record = record._replace(
                    forwards=record.forwards + before.forwards,
                    backwards=record.backwards + before.backwards,
                    found=record.found | before.found,
                    zero_gradient=record.zero_gradient | before.zero_gradient,
                    loss_rising=(record.loss_rising | before.loss_rising) & (not record.fell),
                )
            image = None
            if final and self.keep:
                image = case.images[one] if case.best is None else case.best.points[one]
            if self.journal is not None:
                self.journal.append(record, self.checksums[record.example], image)
            else:
                self.records.add(record)
                if image is not None:
                    self.images[record.attack, record.example] = image.cpu()
        if final:
            self.decided += len(case.numbers)
            self.fresh += len(case.numbers)
            if self.on_progress is not None and self.engine is not None:
                seconds = time.perf_counter() - self.began
                self.on_progress(
                    Progress(self.decided, self.total, len(self.chains), self.fresh, seconds, self.spent + self.engine.spent)
                )

    def report(self, seconds: float, flags: list[Flag]) -> RobustnessReport:
        """Of all processes together."""
        records = self.shard.gather(self.records)
        complete = all(self.shard.gather_objects(self.complete))
        self.images = {key: image for part in self.shard.gather_objects(self.images) for key, image in part.items()}
        summaries = {name: self._summary(records, number, seconds) for number, name in enumerate(self.attacks)}
        clean = next(iter(summaries.values())).clean_correct
        report = RobustnessReport(clean, summaries, flags, complete)
        if flags:
            report.checks = flags + check_outcome(report)
        return report

    def _summary(self, records: Records, number: int, seconds: float) -> AttackSummary:
        columns = records.of_attack(number)
        flag = {name: columns[name].bool() for name in ("zero_gradient", "loss_rising")}
        adversarial = None
        if self.keep:
            images = [self._image(number, index, records) for index in columns["example"].tolist()]
            adversarial = torch.stack(images) if images else torch.zeros(0, *self.shape, dtype=self.dtype)
        return AttackSummary(
            stages=tuple((_radius(stage), stage.attack.name) for stage in self.chains[number]),
            **{name: columns[name].bool() for name in ("clean_correct", "fell", "decided", "found")},
            **{name: columns[name] for name in ("passed", "prediction", "distance", "steps")},
            adversarial=adversarial,
            flags=flag,
            seconds=seconds,
            forwards=int(columns["forwards"].sum()),
            backwards=int(columns["backwards"].sum()),
        )

    def _image(self, attack: int, index: int, records: Records) -> Tensor:
        if (attack, index) in self.images:
            return self.images[attack, index]
        record = records.get(attack, index)
        image = None if record is None or self.journal is None else self.journal.image(record, self.shape, self.dtype)
        return torch.full(self.shape, float("nan"), dtype=self.dtype) if image is None else image


def _check_attacks(model: Model, attacks: Mapping[str, Attack], batch_size: int) -> None:
    if not attacks:
        raise ValueError("attacks must hold at least one attack, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for name, attack in attacks.items():
        if attack.model is not model:
            raise ValueError(f"attacks[{name!r}] must be made for the model that is evaluated, got one for another model")
        if isinstance(attack.eps, Tensor) and attack.eps.ndim:
            raise ValueError(f"attacks[{name!r}] must have a single eps, got one an example")
    bounds = {name: attack.bounds for name, attack in attacks.items()}
    if len(set(bounds.values())) > 1:
        raise ValueError(f"attacks must have the same bounds, got {bounds}")


def _chain(attack: Attack, eps: Sequence[float] | None) -> list[Stage]:
    radii = [float(attack.eps)] if eps is None else sorted(float(e) for e in eps)
    if not radii or radii[0] < 0:
        raise ValueError(f"eps must hold at least one radius, none below 0, got {eps}")
    return [Stage(stage, radius) for radius in radii for stage in attack.stages]


def _radius(stage: Stage) -> float:
    assert stage.eps is not None
    return stage.eps


def _cut(chunk: Chunk, part: slice) -> Chunk:
    return Chunk(chunk.images[part], chunk.labels[part], chunk.indices[part])


def _batches(data: Batches, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor) and isinstance(data[1], Tensor):
        yield from zip(data[0].split(batch_size), data[1].split(batch_size), strict=True)
    else:
        yield from data  # type: ignore[misc]  # an iterable of batches
