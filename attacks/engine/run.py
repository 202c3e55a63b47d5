"""One attack on one batch: inputs checked, the engine run, an AttackResult made."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ironmoe.attacks.engine.attacked_model import check_images
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.job import Job, Stage
from ironmoe.attacks.engine.queue import Chunk, Engine
from ironmoe.attacks.engine.records import Records, records_of
from ironmoe.attacks.engine.search import Search
from ironmoe.attacks.result import AttackResult


def run_attack(
    attack: Search, images: Tensor, labels: Tensor, indices: Tensor | None = None
) -> AttackResult:
    """``Attack.run``: all images at once in the batch, which shrinks as they leave it."""
    check_images(images, labels, attack.bounds)
    if indices is not None and indices.shape != labels.shape:
        raise ValueError(f"indices must have shape ({len(images)},), got {tuple(indices.shape)}")
    if isinstance(attack.eps, Tensor) and attack.eps.ndim and attack.eps.shape != labels.shape:
        raise ValueError(
            f"eps must be a number or have shape ({len(images)},), got shape "
            f"{tuple(attack.eps.shape)}"
        )
    with borrowed(attack.model):
        chunk = prepared(images, labels, indices)
        eps = torch.as_tensor(attack.eps, dtype=torch.float64, device=images.device).expand(
            len(images)
        )
        result = _Collected(chunk)
        stages = [Stage(each) for each in attack.stages]
        for stage in stages:
            stage.attack.attacked_model.image_dtype = images.dtype
        size = max(len(images), 1)
        unit = attack.images_per_unit(size)
        check_groups(stages, unit)
        Engine([stages], result.take, batch_size=size, units=[unit], device=images.device).run(
            [chunk._replace(eps=eps)]
        )
        return result.finished()


def prepared(images: Tensor, labels: Tensor, indices: Tensor | None, first: int = 0) -> Chunk:
    """Detached, in at least float32, numbered."""
    numbers = torch.arange(first, first + len(images)) if indices is None else _plain(indices)
    wide = torch.promote_types(images.dtype, torch.float32)
    return Chunk(_plain(images).to(wide), _plain(labels), numbers.to(images.device, torch.int64))


def units(chunk: Chunk, unit: int) -> Iterator[tuple[Chunk, int]]:
    """(images, how many belong together): whole units, and what is left over as one smaller
    unit."""
    whole = len(chunk.labels) // unit * unit
    for part, size in ((slice(0, whole), unit), (slice(whole, None), len(chunk.labels) - whole)):
        if size and len(chunk.labels[part]):
            yield Chunk(*(None if field is None else field[part] for field in chunk)), size  # type: ignore[arg-type]


def check_groups(stages: list[Stage], unit: int) -> None:
    """Refuse attacks that cannot be right on images that influence each other."""
    for stage in stages:
        attack = stage.attack
        if unit == 1 or attack.takes_groups:
            continue
        why = (
            "a model whose images influence each other (a capacity or Expert Choice, groups of "
            f"{unit}); use FGSM, PGD, MIFGSM or APGD, "
            "or a dropless model"
            if attack.coupled_by_model
            else f"{attack.attacked_model.routing}, a loss that all images share; use FGSM, PGD, "
            "MIFGSM "
            "or APGD, or another routing mode"
        )
        raise ValueError(
            f"{type(attack).__name__} accepts or rejects each image's step by itself, which is "
            f"wrong for {why}"
        )


class _Collected:
    """Cases, as they are decided, put in the order of the batch."""

    def __init__(self, chunk: Chunk) -> None:
        self.adversarial, self.records = chunk.images.clone(), Records()
        self.place = {number: place for place, number in enumerate(chunk.indices.tolist())}
        if len(self.place) < len(chunk.indices):
            raise ValueError(
                f"indices must differ from each other, got {len(self.place)} different ones of "
                f"{len(chunk.indices)}"
            )

    def take(self, job: Job, final: bool) -> None:
        for one, record in enumerate(records_of(job, final)):
            self.records.add(record._replace(example=self.place[record.example]))
            outcome = job.outcomes[one]
            if outcome is not None:
                self.adversarial[self.place[record.example]] = outcome.point

    def finished(self) -> AttackResult:
        columns = {
            name: column.to(self.adversarial.device)
            for name, column in self.records.of_attack(0).items()
        }
        return AttackResult(
            adversarial=self.adversarial,
            clean_correct=columns["clean_correct"].bool(),
            success=columns["fell"].bool(),
            found=columns["found"].bool(),
            flags={name: columns[name].bool() for name in ("zero_gradient", "loss_rising")},
            **{
                name: columns[name]
                for name in ("prediction", "distance", "steps", "forwards", "backwards")
            },
        )


def _plain(tensor: Tensor) -> Tensor:
    """Detached; an inference tensor, which autograd refuses, becomes a copy that it takes."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
