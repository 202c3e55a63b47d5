"""One attack on one batch: inputs are checked, the engine runs, an AttackResult is made."""

import torch
from torch import Tensor

from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.counters import result_fields
from ironmoe.attacks.engine.coupling import check_groups
from ironmoe.attacks.engine.inputs import Chunk, check_images, prepared
from ironmoe.attacks.engine.job import Job, Stage
from ironmoe.attacks.engine.judging.judge import Judge
from ironmoe.attacks.engine.judging.passes import PASSES, check_passes
from ironmoe.attacks.engine.queue import Engine
from ironmoe.attacks.engine.records import Records, records_of
from ironmoe.attacks.engine.search import Search
from ironmoe.attacks.extra import Extra, check_taken
from ironmoe.attacks.result import AttackResult

# So many points show whether a model is random.
FEW = 64


def run_attack(
    attack: Search,
    images: Tensor,
    labels: Tensor,
    indices: Tensor | None = None,
    *,
    extra: Extra | None = None,
    passes: int | None = None,
) -> AttackResult:
    """``Attack.run``: all images are in the batch at once, and it shrinks as they leave it."""
    _check(attack, images, labels, indices)
    check_passes(passes)
    chunk = prepared(images, labels, indices, extra=extra)
    if chunk.side:
        check_taken(attack.model, chunk.side, "extra must be None for this model")
    if passes is None and any(each.eot > 1 for each in attack.stages):
        passes = PASSES

    result, saw_two_answers = _run(attack, chunk, images.dtype, Judge(passes or 1))
    if passes is None and saw_two_answers and _is_random(attack, chunk, result):
        # What one pass confirms or denies is luck, so nothing of that run counts.
        result = _run(attack, chunk, images.dtype, Judge(PASSES))[0].with_passes_of(result)
    return result


def _run(
    attack: Search, chunk: Chunk, dtype: torch.dtype, judge: Judge
) -> tuple[AttackResult, bool]:
    """(what was found, whether the model gave two answers to one image)."""
    with borrowed(attack.model):
        images = chunk.images
        count = len(images)
        region = attack.region(images)
        eps = region.radius.to(images.device).expand(count)
        by_image = {name: column.to(images.device) for name, column in region.side.items()}

        stages = [Stage(each) for each in attack.stages]
        for each in attack.stages:
            each.attacked_model.image_dtype = dtype
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
            judge=judge,
        )
        engine.run([chunk._replace(eps=eps, side={**chunk.side, **by_image})])
        return collected.result(judge.passes), engine.saw_two_answers


def _is_random(attack: Search, chunk: Chunk, result: AttackResult) -> bool:
    """Whether the model, asked again and again about a few of the final images, gives two verdicts
    on one. Those at which it gave two answers come first."""
    judge = Judge(PASSES)
    doubts = result.found.long() + (result.found & ~result.success)
    places = doubts.argsort(descending=True, stable=True)[:FEW]
    if attack.coupled_by_model:  # whole groups
        group = attack.images_per_unit(len(doubts))
        places = torch.arange(len(doubts), device=doubts.device)[: max(FEW // group, 1) * group]
    few = chunk.part(places)
    with borrowed(attack.model):
        judgement = judge(attack, result.adversarial[places], {"label": few.labels, **few.side})
    hits = judgement.hits.sum(1)
    return bool(((hits > 0) & (hits < judge.passes)).any())


def _check(attack: Search, images: Tensor, labels: Tensor, indices: Tensor | None) -> None:
    """ValueError, TypeError: a batch that does not go with the attack."""
    check_images(images, labels, attack.bounds, attack.goal)
    attack.region(images)
    for stage in attack.stages:
        stage.check_grid(images)

    if indices is not None and indices.shape != (len(images),):
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

    def result(self, passes: int) -> AttackResult:
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
            clean_figure=columns["clean_figure"],
            figure=columns["figure"],
            passes=passes,
            hits=columns["hits"],
            **result_fields(columns),
        )
