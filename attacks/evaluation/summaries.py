"""Records in, the summary of an attack out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ironmoe.attacks.balls.elements import is_by_image
from ironmoe.attacks.balls.grid import SLACK
from ironmoe.attacks.engine.counters import result_fields
from ironmoe.attacks.engine.job import Stage
from ironmoe.attacks.engine.records import Records
from ironmoe.attacks.engine.search import Search
from ironmoe.attacks.evaluation.findings.summary import AttackSummary
from ironmoe.attacks.evaluation.journal import Journal

PER_IMAGE = ("label", "clean_prediction", "forwards", "backwards")


@dataclass
class FinalImages:
    """Where the final images are: in memory by (attack, example), or in the files of a journal.

    shape, dtype: of an image.
    """

    in_memory: Mapping[tuple[int, int], Tensor]
    journal: Journal | None
    shape: torch.Size
    dtype: torch.dtype

    def of(self, records: Records, attack: int, examples: Sequence[int]) -> Tensor:
        """(N, …) on CPU; NaN where a budget left an image undecided."""
        if not examples:
            return torch.zeros(0, *self.shape, dtype=self.dtype)
        return torch.stack([self._one(records, attack, example) for example in examples])

    def _one(self, records: Records, attack: int, example: int) -> Tensor:
        if (attack, example) in self.in_memory:
            return self.in_memory[attack, example]

        record = records.get(attack, example)
        image = None
        if record is not None and self.journal is not None:
            image = self.journal.image(record, self.shape, self.dtype)
        return torch.full(self.shape, float("nan"), dtype=self.dtype) if image is None else image


@dataclass(frozen=True)
class KeptImages:
    """The final images of one attack, read when they are asked for.

    numbers (N,) int64: of the examples that the summary is about.
    """

    images: FinalImages
    records: Records
    attack: int
    numbers: Tensor

    def __call__(self, places: Tensor) -> Tensor:
        """(n, …) at some places, or at a mask (N,)."""
        return self.images.of(self.records, self.attack, self.numbers[places].tolist())


def examples_of_all(records: Records, attacks: int, count: int | None) -> Tensor:
    """(N,) int64, ascending: the examples that all of the attacks know, of the first ``count``.

    A kill while a chunk is admitted may leave an image that only some attacks know. It counts once
    all know it.
    """
    known = [set(records.of_attack(number)["example"].tolist()) for number in range(attacks)]
    common = torch.tensor(sorted(set.intersection(*known)), dtype=torch.int64)
    return common if count is None else common[common < count]


def summary_of(
    records: Records,
    number: int,
    examples: Tensor,
    *,
    stages: Sequence[Stage],
    passes: int,
    final: FinalImages | None,
    in_memory: bool,
    checksums: Mapping[int, int],
    shape: torch.Size,
) -> AttackSummary:
    """What attack ``number`` did to these examples.

    passes: how many each verdict rests on; final: where their images are, if they are kept;
    in_memory: the summary is to hold them all; checksums: example → checksum of its image and
    label, of those that are known; shape: of an image.
    """
    columns = records.of_attack(number, examples)
    counted = result_fields(columns)
    per_image = {name: columns[name] for name in PER_IMAGE}
    per_image["checksum"] = torch.tensor(
        [checksums.get(example, -1) for example in columns["example"].tolist()], dtype=torch.int64
    )
    counted |= {name: int(counted[name].sum()) for name in ("forwards", "backwards")}
    adversarial = kept = None
    if final is not None:
        kept = KeptImages(final, records, number, columns["example"])
        if in_memory:
            adversarial = kept(torch.arange(len(kept.numbers)))
            kept = None

    return AttackSummary(
        stages=tuple((_radius(stage), stage.attack.name) for stage in stages),
        examples=columns["example"],
        clean_correct=columns["clean_correct"].bool(),
        passed=columns["passed"],
        fell=columns["fell"].bool(),
        decided=columns["decided"].bool(),
        prediction=columns["prediction"],
        distance=columns["distance"],
        steps=columns["steps"],
        adversarial=adversarial,
        kept=kept,
        clean_figure=columns["clean_figure"],
        figure=columns["figure"],
        skipped=columns["skipped"].bool(),
        passes=passes,
        hits=columns["hits"],
        alike=float(columns["alike"].mean()) if len(columns["alike"]) else 1.0,
        norm=str(getattr(stages[0].attack, "norm", "")),
        targeted=stages[0].attack.goal.targeted,
        box=_size_of_box(stages[0].attack, shape),
        still=_stands_still(stages[-1], shape),
        takes_steps=any(_takes_steps(stage.attack) for stage in stages),
        blind=tuple({stage.attack.name for stage in stages if not stage.attack.gradient}),
        per_image=per_image,
        **counted,
    )


def leave_out_skipped(summaries: Iterable[AttackSummary]) -> None:
    """An image that one attack could say nothing of is left out of every number, so that all of
    them are about the same images. Which attack it was stays in ``per_image``."""
    summaries = list(summaries)
    for summary in summaries:
        summary.per_image["skipped_under_attack"] = summary.skipped & summary.attacked
    skipped = torch.stack([summary.skipped for summary in summaries]).any(0)
    for summary in summaries:
        summary.skipped = skipped


def _radius(stage: Stage) -> float:
    assert stage.eps is not None
    return stage.eps


def _size_of_box(attack: Search, shape: torch.Size) -> float:
    """The distance between two opposite corners of the image box, in the attack's norm; inf where
    each image has a box of its own, or a part of it may not change."""
    if any(is_by_image(bound, tuple(shape)) for bound in attack.bounds):
        return float("inf")
    low, high = _corners(attack, shape)
    ball = attack.ball({"clean": low, "eps": torch.zeros(1).double()})
    everything_moves = int(ball.movable) == low.numel()
    return float(ball.distance(high)) if everything_moves else float("inf")


def _stands_still(stage: Stage, shape: torch.Size) -> bool:
    """Whether no element of an image may change: eps is 0, or less than a step of ``levels``."""
    attack, radius = stage.attack, _radius(stage)
    if radius == 0 or any(is_by_image(bound, tuple(shape)) for bound in attack.bounds):
        return radius == 0

    low, high = _corners(attack, shape)
    ball = attack.ball({"clean": low, "eps": torch.zeros(1).double()})
    reach = radius * torch.as_tensor(getattr(ball, "scale", 1.0)).double()
    levels = getattr(attack, "levels", None)
    step = 0.0 if levels is None else (high - low) / (levels - 1)
    return not bool(((reach > 0) & (reach * (1 + SLACK) >= step)).any())


def _takes_steps(attack: Search) -> bool:
    """Whether a search that has steps takes any that lead somewhere."""
    steps, alpha = (getattr(attack, name, None) for name in ("steps", "alpha"))
    goes_nowhere = alpha is not None and not bool((torch.as_tensor(alpha) != 0).any())
    return steps != 0 and not goes_nowhere


def _corners(attack: Search, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """(1, …) float64, the lowest and the highest image."""
    low, high = (
        torch.as_tensor(bound, dtype=torch.float64).cpu().expand(1, *shape)
        for bound in attack.bounds
    )
    return low, high
