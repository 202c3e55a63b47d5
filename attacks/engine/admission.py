"""How images come into the queue: the clean prediction of a chunk, and a job for each unit of it.

Nothing is attacked here, and nothing is known of active batches and of the budget.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.engine.counters import Counters
from ironmoe.attacks.engine.coupling import images_per_unit
from ironmoe.attacks.engine.inputs import Chunk
from ironmoe.attacks.engine.job import Example, Job, Stage
from ironmoe.attacks.engine.judging.judge import Judge, Judgement
from ironmoe.attacks.goals.goal import Goal
from ironmoe.attacks.goals.labels import needs_logits
from ironmoe.attacks.losses import check_several_classes
from ironmoe.attacks.ruled_out import ruled_out


class Resumed(NamedTuple):
    """Where a job begins: its stage, and which of its images fell at an earlier one."""

    stage: int
    fell: list[bool]


def from_the_start(chain: int, numbers: list[int]) -> Resumed:
    """Where a unit begins of which nothing is known."""
    return Resumed(0, [False] * len(numbers))


class Beginning(NamedTuple):
    """A unit of a chunk that is not decided yet, under one chain; ``places`` are in the chunk."""

    chain: int
    places: slice
    resumed: Resumed


class Admission:
    """Makes the jobs of a chunk.

    Args:
        chains: each is a sequence of stages.
        unit_sizes: for each chain, how many images a unit has.
        batch_size: about so many images are predicted together.
        judge: makes the clean prediction.
        resume: (chain, the numbers of a unit's images) → where to begin; None: nothing to do.
    """

    def __init__(
        self,
        chains: Sequence[Sequence[Stage]],
        unit_sizes: Sequence[int],
        batch_size: int,
        judge: Judge,
        resume: Callable[[int, list[int]], Resumed | None],
    ) -> None:
        self.chains = chains
        self.unit_sizes = unit_sizes
        self.batch_size = batch_size
        self.judge = judge
        self.resume = resume
        self.targets = max((stage.attack.targets for chain in chains for stage in chain), default=0)

    def beginnings(self, chunk: Chunk) -> list[Beginning]:
        """The units that are not decided. What is left over at the end of a chunk makes a smaller
        unit; only the last chunk may have such a rest."""
        numbers = chunk.indices.tolist()
        found = []
        for chain, unit_size in enumerate(self.unit_sizes):
            for first in range(0, len(numbers), unit_size):
                places = slice(first, min(first + unit_size, len(numbers)))
                resumed = self.resume(chain, numbers[places])
                if resumed is not None:
                    found.append(Beginning(chain, places, resumed))
        return found

    def places_to_predict(self, chunk: Chunk, beginnings: Sequence[Beginning]) -> Tensor:
        """(m,) int64, the images whose clean prediction is needed. Images that influence each other
        are predicted in the groups that they are attacked in."""
        count = len(chunk.labels)
        group = self._group_size
        asked = torch.zeros(count, dtype=torch.bool)
        for beginning in beginnings:
            first = beginning.places.start // group * group
            end = -(-beginning.places.stop // group) * group
            asked[first:end] = True
        return asked.nonzero().squeeze(1).to(chunk.labels.device)

    def judged(self, chunk: Chunk, places: Tensor) -> Judgement:
        """What the judge says of the clean images at these places; 0 in other rows.

        Raises:
            ValueError: labels that do not go with the model's outputs.
        """
        group = self._group_size
        count = len(chunk.labels)
        in_whole_groups = places < count // group * group
        together = max(1, self.batch_size // group) * group

        parts = [*places[in_whole_groups].split(together), places[~in_whole_groups]]
        answers = [self._judged(chunk.part(part)) for part in parts if len(part)]
        columns = (torch.cat(column) for column in zip(*answers, strict=True))
        return Judgement(
            *(
                column.new_zeros(count, *column.shape[1:]).index_copy(0, places, column)
                for column in columns
            )
        )

    def jobs(
        self, chunk: Chunk, beginnings: Sequence[Beginning], judgement: Judgement
    ) -> Iterator[Job]:
        """A job for each beginning.

        Raises:
            ValueError: too few classes.
            TypeError: labels alone, for an attack with targets.
        """
        classes = self._other_classes(chunk.labels, self._ranking(chunk, beginnings, judgement))
        first = self.chains[0][0].attack
        if self._goal.has_classes and judgement.outputs.ndim == 2 and not first.gradient:
            check_several_classes(judgement.outputs, first.name)  # a loss looks for itself

        correct = [self._correct(chain, chunk, judgement) for chain in self.chains]
        examples = self._examples(chunk, judgement, classes)
        ranked = [Counters(forwards=self.passes - self.judge.passes)]
        for chain, places, resumed in beginnings:
            stages = self.chains[chain]
            known = zip(examples[places], correct[chain][places], resumed.fell, strict=True)
            job = Job(
                chain=chain,
                stages=stages,
                stage=resumed.stage,
                images=chunk.images[places],
                labels=chunk.labels[places],
                side={name: column[places] for name, column in chunk.side.items()},
                first=Counters(forwards=self.judge.passes),
                examples=[
                    example._replace(
                        clean_correct=is_right and not example.is_bad, fell_before=fell
                    )
                    for example, is_right, fell in known
                ],
                coupled_by_model=stages[resumed.stage].attack.coupled_by_model,
            )
            job.note(ranked * len(job.examples))
            yield job

    @property
    def passes(self) -> int:
        """How many forward passes the admission of an image takes."""
        return self.judge.passes + self._ranks_by_itself

    @property
    def _ranks_by_itself(self) -> bool:
        """Whether the search's own model says which classes are targets, since the judge's is
        another one."""
        return self.targets > 0 and self.judge.is_another

    @property
    def _group_size(self) -> int:
        """How many images the model must see together."""
        return images_per_unit(self.chains[0][0].attack.model, self.batch_size)

    @property
    def _goal(self) -> Goal:
        """All attacks have the same one."""
        return self.chains[0][0].attack.goal

    def _judged(self, chunk: Chunk) -> Judgement:
        columns = {"label": chunk.labels, **chunk.side}
        judgement = self.judge(self.chains[0][0].attack, chunk.images, columns, are_clean=True)
        if chunk.unread is None:
            return judgement
        return judgement._replace(bad=judgement.bad | chunk.unread)

    def _correct(self, chain: Sequence[Stage], chunk: Chunk, judgement: Judgement) -> list[bool]:
        """Whether each clean image is not yet what the attacks of this chain want it to be."""
        reached = judgement.reached
        if not self.judge.is_patient:
            reached = chain[0].attack.fooled(judgement.outputs, {"label": chunk.labels})
        return (~reached).tolist()

    def _ranking(
        self, chunk: Chunk, beginnings: Sequence[Beginning], judgement: Judgement
    ) -> Tensor:
        """Logits (n, C) of the clean images, of the model whose likeliest classes are targets; 0 in
        rows that nobody asks about."""
        if not self._ranks_by_itself:
            return judgement.outputs

        attacked_model = self.chains[0][0].attack.attacked_model
        places = self.places_to_predict(chunk, beginnings)
        parts = [chunk.part(part) for part in places.split(self.batch_size)]
        logits = torch.cat([attacked_model.judge(part.images, part.side) for part in parts])
        return logits.new_zeros(len(chunk.labels), *logits.shape[1:]).index_copy(0, places, logits)

    def _examples(
        self, chunk: Chunk, judgement: Judgement, classes: list[list[int]]
    ) -> list[Example]:
        """What is known of each image, whatever the chain."""
        numbers = chunk.indices.tolist()
        has_classes = self._goal.has_classes
        labels = chunk.labels.tolist() if has_classes else [-1] * len(numbers)
        predictions = judgement.prediction.tolist()
        figures = judgement.figure.tolist()
        hits = judgement.hits.tolist()
        bad = judgement.bad.tolist()
        eps = [None] * len(numbers) if chunk.eps is None else chunk.eps.tolist()

        return [
            Example(
                number=numbers[one],
                label=labels[one],
                clean_prediction=predictions[one],
                clean_correct=False,
                classes=classes[one],
                eps=eps[one],
                fell_before=False,
                figure=figures[one],
                hits=(hits[one][0], hits[one][1]),
                is_bad=bad[one],
            )
            for one in range(len(numbers))
        ]

    def _other_classes(self, labels: Tensor, logits: Tensor) -> list[list[int]]:
        """Of each image the classes that are targets, the likeliest first: not its label, and not
        those that the model rules out, but at least one."""
        if not self.targets:
            return [[] for _ in range(len(labels))]
        if logits.ndim < 2:
            stages = [stage for chain in self.chains for stage in chain]
            raise needs_logits(next(s.attack.name for s in stages if s.attack.targets))
        if logits.shape[1] < 2:
            raise ValueError(
                "model must have at least 2 classes for an attack with targets, got "
                f"{logits.shape[1]}"
            )

        count = min(self.targets + 1, logits.shape[1])
        ranked = logits.topk(count, dim=1).indices

        # The label moves to the end, and off it if it was not among them.
        is_label = (ranked == labels.unsqueeze(1)).to(torch.int8)
        others = ranked.gather(1, is_label.argsort(dim=1, stable=True))[:, :-1]

        possible = (~ruled_out(logits)).gather(1, others).sum(1).clamp_min(1)
        return [row[:there] for row, there in zip(others.tolist(), possible.tolist(), strict=True)]
