"""What came out of ``ironmoe attack``: the numbers that table, pictures and report are made of."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks import Accuracy, Flag, RobustnessReport
from ironmoe.attacks.evaluation.findings.flag import NOT_LOOKED_AT, PASSED, TRIPPED
from ironmoe.bench.attack.attacked_images import AttackedImages
from ironmoe.bench.attack.parts import Part, describe
from ironmoe.bench.attack.rows import Cost, RobustnessRow
from ironmoe.bench.attack.suite import Suite
from ironmoe.bench.common.radii import from_255


class ShownImage(NamedTuple):
    """An image to show.

    number: its place in the report; attack: whose final image is shown; fell_at_255: the eps in
    units of 1/255 at which it fell, infinity if it held; margin: what is left of one that held.
    """

    number: int
    attack: str
    fell_at_255: float
    margin: float | None = None


@dataclass
class EvaluationOutcome:
    """One evaluation of one model.

    name: of the model; report: with the seconds of all runs together; parts: of each attack, as it
    was made.

    images: those that were to be attacked, which are read when they are shown.

    margins: (A, N) of ``margins_left``, for the N images that the report is about; None without all
    final images; routing: of ``measure_routing``, for each eps.

    unread: number of an image → why it could not be read; waited: the seconds that the attacks
    waited for images, after the first ones; remarks: what there is to say of them afterwards;
    together: how many images influence each other's predictions.
    """

    name: str
    report: RobustnessReport
    suite: Suite
    parts: dict[str, tuple[Part, ...]]
    images: AttackedImages
    margins: Tensor | None
    routing: list[dict[str, Any]]
    unread: dict[int, str] = field(default_factory=dict)
    waited: float = 0.0
    remarks: list[str] = field(default_factory=list)
    together: int = 1

    @property
    def title(self) -> str:
        """The name stands in quotes, since a model may be called "robust"."""
        return f'Model "{self.name}" under attack in {self.suite.norm}'

    @property
    def description(self) -> str:
        """The attacks in one line."""
        return describe(self.suite, self.parts)

    @property
    def reached(self) -> int:
        """How many images the evaluation reached before a budget ended it."""
        return len(self.report.clean_correct)

    @property
    def index(self) -> Tensor:
        """(N,) the numbers of the images that the report is about, in its order."""
        return next(iter(self.report.attacks.values())).examples

    @property
    def labels(self) -> Tensor:
        """(N,) int64, the classes of the images that the report is about."""
        return next(iter(self.report.attacks.values())).per_image["label"]

    @property
    def rows_of_data(self) -> Tensor:
        """(M,) int64, where the images that were to be attacked are in the data."""
        return self.images.rows

    def decided_something(self, name: str) -> bool:
        """Whether any image that is right from the start was decided, at the smallest eps at
        least."""
        summary = self.report.attacks[name]
        clean = int(summary.clean_correct.sum())
        return clean == 0 or int(summary.undecided_at(summary.eps[0]).sum()) < clean

    def max_queries(self, name: str) -> int:
        """Queries to the model in the longest attempt that the attack allows."""
        return max(part.max_queries for part in self.parts[name])

    def fell_at_255(self, name: str) -> Tensor:
        """(N,) float64: ``AttackSummary.fell_at`` in units of 1/255, as exactly the numbers that
        the suite has."""
        at = self.report.attacks[name].fell_at
        return torch.tensor([self.eps_255(radius) for radius in at.tolist()], dtype=torch.float64)

    def eps_255(self, radius: float) -> float:
        """A radius of the suite in units of 1/255, as exactly the number that the suite has; other
        numbers as they are."""
        given = {from_255(eps): eps for eps in self.suite.eps_255}
        return given.get(radius, radius)

    def robust_at(self, eps_255: float) -> Tensor:
        """(N,) bool: images that are classified right and for which no attack found anything up to
        this eps."""
        robust = self.report.clean_correct.clone()
        for summary in self.report.attacks.values():
            robust &= summary.robust_at(from_255(eps_255))
        return robust

    def worst_case(self, eps_255: float) -> Accuracy:
        """The robust accuracy against all attacks together: an image counts only if it held against
        every attack."""
        return self.report.worst_case_at(from_255(eps_255))

    def undecided_at(self, eps_255: float) -> Tensor:
        """(N,) bool: images for which nothing was found so far while some attack has not run to its
        end."""
        open_ = torch.zeros_like(self.report.clean_correct)
        for summary in self.report.attacks.values():
            open_ |= summary.undecided_at(from_255(eps_255))
        return open_ & self.robust_at(eps_255)

    @property
    def rows(self) -> list[RobustnessRow]:
        """A row for each attack and eps; the rows of the worst case are last."""
        rows = []
        for name, summary in self.report.attacks.items():
            for eps_255 in self.suite.eps_255:
                eps = from_255(eps_255)
                rows.append(
                    self._row(
                        name,
                        eps_255,
                        accuracy=summary.robust_accuracy_at(eps),
                        robust=summary.robust_at(eps),
                        undecided=summary.undecided_at(eps),
                    )
                )
        return rows + self.worst_rows

    def _row(
        self,
        name: str,
        eps_255: float,
        *,
        accuracy: Accuracy,
        robust: Tensor,
        undecided: Tensor,
    ) -> RobustnessRow:
        counted = ~next(iter(self.report.attacks.values())).skipped
        return RobustnessRow(
            attack=name,
            eps_255=eps_255,
            robust=accuracy.most,
            fell=int((self.report.clean_correct & ~robust & counted).sum()),
            undecided=int((undecided & counted).sum()),
        )

    @property
    def worst_rows(self) -> list[RobustnessRow]:
        """A row of the worst case for each eps."""
        return [
            self._row(
                "",
                eps,
                accuracy=self.worst_case(eps),
                robust=self.robust_at(eps),
                undecided=self.undecided_at(eps),
            )
            for eps in self.suite.eps_255
        ]

    def cost(self, name: str) -> Cost:
        """What one attack found and cost.

        All attacks share one queue. Its time, without the checks, is divided among them in the
        proportion of their passes, without those over the clean images.
        """
        summary = self.report.attacks[name]
        passes = {
            key: s.forwards + s.backwards - len(s.examples) * s.passes
            for key, s in self.report.attacks.items()
        }
        seconds = self.report.seconds * passes[name] / max(sum(passes.values()), 1)

        decided = int((summary.decided & summary.clean_correct).sum())
        return Cost(
            attack=name,
            found=int((summary.found & summary.clean_correct).sum()),
            confirmed=int(summary.fell.sum()),
            images_per_second=decided / seconds if decided and seconds else None,
            forwards=summary.forwards,
            backwards=summary.backwards,
        )

    def stages(self, name: str) -> dict[str, list[int]]:
        """How many images fell to each part of an ensemble, at each eps. Empty for a single
        attack."""
        summary = self.report.attacks[name]
        parts = list(dict.fromkeys(part for _, part in summary.stages))
        counts = {part: [0] * len(self.suite.eps_255) for part in parts}
        radii = list(summary.eps)
        for number in summary.passed[summary.fell].tolist():
            radius, part = summary.stages[number]
            counts[part][radii.index(radius)] += 1
        return counts if len(parts) > 1 else {}

    def attempted(self, name: str) -> dict[str, list[int]]:
        """How many images fell to each part or held against it, at each eps, in the same order."""
        summary = self.report.attacks[name]
        counts: dict[str, list[int]] = {}
        for number, (_, part) in enumerate(summary.stages):
            here = (summary.passed > number) | (summary.fell & (summary.passed == number))
            counts.setdefault(part, []).append(int((here & summary.clean_correct).sum()))
        return counts

    @property
    def checks(self) -> list[Flag]:
        """The checks against false security: tripped ones first, then those not looked at."""
        order = (TRIPPED, NOT_LOOKED_AT, PASSED)
        return sorted(self.report.checks, key=lambda flag: order.index(flag.state))

    def easiest(self, count: int = 6) -> list[ShownImage]:
        """The images that fell at the smallest eps, the nearest first."""
        return [shown for _, shown in sorted(self._first_falls().items())][:count]

    def hardest(self, count: int = 6) -> list[ShownImage]:
        """The images that held against every attack, those with the largest margin left first; then
        those that fell last. No image is both easy and hard."""
        held = []
        if self.margins is not None:
            least, nearest = self.margins.min(0)
            names = list(self.report.attacks)
            order = least.nan_to_num(float("-inf")).argsort(descending=True, stable=True).tolist()
            held = [
                ShownImage(index, names[int(nearest[index])], float("inf"), float(least[index]))
                for index in order
                if not least[index].isnan()
            ]

        fell = [shown for _, shown in sorted(self._first_falls().items(), reverse=True)]
        easiest = self.easiest(count)
        return (held + [shown for shown in fell if shown not in easiest])[:count]

    def _first_falls(self) -> dict[tuple[float, float, int, int], ShownImage]:
        """Every image that fell, by the key (eps, distance, steps, index) of its earliest fall."""
        earliest: dict[int, tuple[tuple[float, float, int, int], str]] = {}
        for name, summary in self.report.attacks.items():
            for index in summary.fell.nonzero().squeeze(1).tolist():
                key = (
                    float(summary.fell_at[index]),
                    float(summary.distance[index]),
                    int(summary.steps[index]),
                    index,
                )
                if index not in earliest or key < earliest[index][0]:
                    earliest[index] = (key, name)

        at = {name: self.fell_at_255(name) for name in self.report.attacks}
        return {
            key: ShownImage(index, name, float(at[name][index]))
            for index, (key, name) in earliest.items()
        }
