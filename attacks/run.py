"""One attack on one batch: inputs are checked, the engine runs, an AttackResult is made."""

from torch import Tensor

from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.counters import result_fields
from ironmoe.attacks.engine.coupling import check_groups
from ironmoe.attacks.engine.inputs import Chunk, check_images, prepared
from ironmoe.attacks.engine.job import Job, Stage
from ironmoe.attacks.engine.queue import Engine
from ironmoe.attacks.engine.records import Records, records_of
from ironmoe.attacks.engine.search import Search
from ironmoe.attacks.result import AttackResult


def run_attack(
    attack: Search, images: Tensor, labels: Tensor, indices: Tensor | None = None
) -> AttackResult:
    """``Attack.run``: all images are in the batch at once, and it shrinks as they leave it."""
    _check(attack, images, labels, indices)

    with borrowed(attack.model):
        chunk = prepared(images, labels, indices)
        count = len(images)
        eps = attack.region(images).radius.to(images.device).expand(count)

        stages = [Stage(each) for each in attack.stages]
        for each in attack.stages:
            each.attacked_model.image_dtype = images.dtype
        batch_size = max(count, 1)
        unit_size = attack.images_per_unit(batch_size)
        check_groups(attack.stages, unit_size)

        collected = _Collected(chunk)
        engine = Engine(
            [stages],
            collected.take,
            batch_size=batch_size,
            unit_sizes=[unit_size],
            device=images.device,
        )
        engine.run([chunk._replace(eps=eps)])
        return collected.result()


def _check(attack: Search, images: Tensor, labels: Tensor, indices: Tensor | None) -> None:
    """ValueError, TypeError: a batch that does not go with the attack."""
    check_images(images, labels, attack.bounds)
    attack.region(images)

    if indices is not None and indices.shape != labels.shape:
        raise ValueError(f"indices must have shape ({len(images)},), got {tuple(indices.shape)}")


class _Collected:
    """Jobs, as they are decided, put in the order of the batch."""

    def __init__(self, chunk: Chunk) -> None:
        self.adversarial = chunk.images.clone()
        self.records = Records()
        self.place = {number: place for place, number in enumerate(chunk.indices.tolist())}

        if len(self.place) < len(chunk.indices):
            raise ValueError(
                f"indices must differ from each other, got {len(self.place)} different ones of "
                f"{len(chunk.indices)}"
            )

    def take(self, job: Job, final: bool) -> None:
        for record, end in zip(records_of(job, final), job.ends, strict=True):
            place = self.place[record.example]
            self.records.add(record._replace(example=place))
            if end is not None:
                self.adversarial[place] = end.point

    def result(self) -> AttackResult:
        device = self.adversarial.device
        columns = self.records.of_attack(0)
        columns = {name: column.to(device) for name, column in columns.items()}
        return AttackResult(
            adversarial=self.adversarial,
            clean_correct=columns["clean_correct"].bool(),
            success=columns["fell"].bool(),
            prediction=columns["prediction"],
            distance=columns["distance"],
            steps=columns["steps"],
            **result_fields(columns),
        )
