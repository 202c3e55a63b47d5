"""What came out of ``ironmoe attack``, in the numbers and words that table, pictures and report are
made of."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks import AttackSummary, Flag, Proportion, RobustnessReport
from ironmoe.bench.attack.parts import Part, describe
from ironmoe.bench.attack.suite import Suite


class Row(NamedTuple):
    """One attack at one eps. fell, undecided: images; these are robust so far, and may fall when
    the run goes on. ``attack`` is empty in the rows of the worst case per sample."""

    attack: str
    eps_255: float
    robust: Proportion
    fell: int
    undecided: int

    @property
    def least(self) -> float:
        """The share that would be left if everything undecided fell."""
        return Proportion(self.robust.count - self.undecided, self.robust.total).value

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson, from the lower end of ``least`` to the upper end of what is robust so
        far."""
        return Proportion(self.robust.count - self.undecided, self.robust.total).interval()[
            0
        ], self.robust.interval()[1]

    @property
    def share(self) -> str:
        return f"{'≤ ' * bool(self.undecided)}{100 * self.robust.value:.1f} %"

    @property
    def brackets(self) -> str:
        return "[{:.1f}, {:.1f}]".format(*(100 * end for end in self.interval))


class Cost(NamedTuple):
    """Of an attack over all eps and all runs. Images per second are those decided; their time is
    that of the common queue, without the checks, divided in the proportion of passes. None of an
    attack that asked nothing or decided none of what it asked about."""

    found: int
    confirmed: int
    images_per_second: float | None
    forwards: int
    backwards: int


class Shown(NamedTuple):
    """An image to show: its place in the report, the attack whose image is shown, the eps in 1/255
    at which it fell (inf: it held), and the margin left of one that held."""

    number: int
    attack: str
    fell_at_255: float
    margin: float | None = None


@dataclass
class Outcome:
    """name: of the model; report: its seconds those of all runs together; parts: of each attack, as
    it was made.

    images (M, …), labels (M,): those that were to be attacked; rows (M,): where they are in the
        data
    margins: (A, N) of ``margins_left``, for the N that the report is about; None without all final
        images
    routing: of ``measure_routing``, for each eps; matched: how classes were matched to logits, if
        not by name
    """

    name: str
    report: RobustnessReport
    suite: Suite
    parts: dict[str, tuple[Part, ...]]
    images: Tensor
    labels: Tensor
    rows_of_data: Tensor
    classes: list[str]
    margins: Tensor | None
    routing: list[dict[str, Any]]
    matched: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} under attack in {self.suite.norm}"

    @property
    def description(self) -> str:
        """The attacks in one line."""
        return describe(self.suite, self.parts)

    @property
    def reached(self) -> int:
        """Images that the evaluation came to before a budget ended it."""
        return len(self.report.clean_correct)

    @property
    def index(self) -> Tensor:
        """(N,) which of ``images`` the report is about, in its order."""
        return next(iter(self.report.attacks.values())).examples

    def decided_something(self, name: str) -> bool:
        """Of the images that are right from the start, at the smallest eps at least."""
        summary = self.report.attacks[name]
        clean = int(summary.clean_correct.sum())
        return clean == 0 or int(summary.undecided_at(summary.eps[0]).sum()) < clean

    def questions(self, name: str) -> int:
        """To the model, of the longest attempt that the attack allows."""
        return max(part.questions for part in self.parts[name])

    def fell_at_255(self, name: str) -> Tensor:
        """(N,) float64 as ``AttackSummary.fell_at``, in units of 1/255: the very numbers of the
        suite."""
        at = self.report.attacks[name].fell_at
        given = {eps / 255: eps for eps in self.suite.eps_255}
        return torch.tensor(
            [given.get(radius, radius) for radius in at.tolist()], dtype=torch.float64
        )

    def robust_at(self, eps_255: float) -> Tensor:
        """(N,) bool: right, and no attack found anything up to this eps."""
        robust = self.report.clean_correct.clone()
        for summary in self.report.attacks.values():
            robust &= summary.robust_at(eps_255 / 255)
        return robust

    def worst_case(self, eps_255: float) -> Proportion:
        """Per sample: an image counts as robust only if it held against every attack."""
        return _share(self.robust_at(eps_255))

    def undecided_at(self, eps_255: float) -> Tensor:
        """(N,) bool: stands so far, and some attack has not run to its end."""
        open_ = torch.zeros_like(self.report.clean_correct)
        for summary in self.report.attacks.values():
            open_ |= summary.undecided_at(eps_255 / 255)
        return open_ & self.robust_at(eps_255)

    @property
    def rows(self) -> list[Row]:
        """Attack by attack, eps by eps; last the worst case."""
        clean = int(self.report.clean_correct.sum())
        rows = []
        for name, summary in self.report.attacks.items():
            for eps in self.suite.eps_255:
                robust = _share(summary.robust_at(eps / 255))
                rows.append(
                    Row(
                        name,
                        eps,
                        robust,
                        clean - robust.count,
                        int(summary.undecided_at(eps / 255).sum()),
                    )
                )
        for eps in self.suite.eps_255:
            robust = self.worst_case(eps)
            rows.append(
                Row("", eps, robust, clean - robust.count, int(self.undecided_at(eps).sum()))
            )
        return rows

    @property
    def worst_rows(self) -> list[Row]:
        return [row for row in self.rows if not row.attack]

    def cost(self, name: str) -> Cost:
        summary = self.report.attacks[name]
        passes = {
            key: s.forwards + s.backwards - len(s.examples)
            for key, s in self.report.attacks.items()
        }  # but for the clean ones
        seconds = self.report.seconds * passes[name] / max(sum(passes.values()), 1)
        decided = bool((summary.decided & summary.clean_correct).any())
        rate = int(summary.decided.sum()) / seconds if decided and seconds else None
        found = int((summary.found & summary.clean_correct).sum())
        return Cost(found, int(summary.fell.sum()), rate, summary.forwards, summary.backwards)

    def stages(self, name: str) -> dict[str, list[int]]:
        """Of an attack that is an ensemble: part → images that fell to it at each eps. Empty for a
        single attack."""
        summary = self.report.attacks[name]
        parts = list(dict.fromkeys(part for _, part in summary.stages))
        counts = {part: [0] * len(self.suite.eps_255) for part in parts}
        radii = list(summary.eps)
        for number in summary.passed[summary.fell].tolist():
            radius, part = summary.stages[number]
            counts[part][radii.index(radius)] += 1
        return counts if len(parts) > 1 else {}

    @property
    def checks(self) -> list[Flag]:
        """Tripped ones first."""
        return sorted(self.report.checks, key=lambda flag: not flag.tripped)

    def easiest(self, count: int = 6) -> list[Shown]:
        """Images that fell at the smallest eps, the nearest first."""
        return [shown for _, shown in sorted(self._first_falls().items())][:count]

    def hardest(self, count: int = 6) -> list[Shown]:
        """Images that held against every attack, those with the largest margin left first; then
        those that fell last. None of them is among the easiest."""
        held = []
        if self.margins is not None:
            least, nearest = self.margins.min(0)
            names = list(self.report.attacks)
            order = least.nan_to_num(float("-inf")).argsort(descending=True, stable=True).tolist()
            held = [
                Shown(index, names[int(nearest[index])], float("inf"), float(least[index]))
                for index in order
                if not least[index].isnan()
            ]
        fell = [shown for _, shown in sorted(self._first_falls().items(), reverse=True)]
        easiest = self.easiest(count)
        return (held + [shown for shown in fell if shown not in easiest])[:count]

    def _first_falls(self) -> dict[tuple[float, float, int, int], Shown]:
        """(eps, distance, steps, index) of the earliest fall of every image that fell → the
        image."""
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
            key: Shown(index, name, float(at[name][index]))
            for index, (key, name) in earliest.items()
        }

    def words(self) -> list[str]:
        """What the numbers say and what they do not."""
        costs = [self.cost(name) for name in self.report.attacks]
        found, confirmed = sum(cost.found for cost in costs), sum(cost.confirmed for cost in costs)
        unit, lines = "(image, attack) pair" if len(costs) > 1 else "image", []
        clean, kinds = self.report.clean_accuracy, len(self.labels.unique())
        if kinds > 1 and clean.value * kinds <= 1:
            lines.append(
                f"The clean accuracy, {clean}, is at or below chance, {100 / kinds:.3g} % for "
                f"{kinds} classes: what is left under attack says "
                "nothing of robustness. Are the classes matched to the right logits, and are "
                "images in [0, 1] what the model expects?"
            )
        tripped = [flag for flag in self.checks if flag.tripped]
        if tripped:
            lines.append(
                f"{len(tripped)} of {len(self.checks)} checks against false security tripped: the "
                "model may be weaker than it looks. "
                + " ".join(
                    f"{flag.name[0].upper()}{flag.name[1:]}: {flag.message}" for flag in tripped
                )
            )
        if not self.report.complete:
            pairs = sum(int((~summary.decided).sum()) for summary in self.report.attacks.values())
            missed = len(self.images) - self.reached
            lines.append(
                f"A budget ended the evaluation early: {pairs} of {self.reached * len(costs)} "
                f"{unit}s are undecided. What ≤ is written "
                "before counts them as robust, and its interval reaches down to where they all fall"
                + (
                    f", and {missed} of {len(self.images)} images were not reached and are not "
                    "counted. "
                    if missed
                    else ". "
                )
                + "The same command goes on from here."
            )
        successes = (
            f"Of {found} {unit}s that the search took for successes, {confirmed} "
            f"{'was' if confirmed == 1 else 'were'} confirmed"
        )
        if found == 1:
            successes = (
                f"The search took one {unit} for a success, and it was "
                f"{'not ' * (not confirmed)}confirmed"
            )
        lines.append(
            f"{successes}: predicted again in full precision by the plain model, and measured "
            "again in float64. Only what is confirmed counts."
            if found
            else "The search found nothing that it took for a success."
        )
        lines.append(
            "Robust accuracy is an upper bound: it is what these attacks left standing. Other "
            "attacks, more steps or more restarts can "
            "only lower it. Intervals are 95 % Wilson intervals: how precisely these images "
            "measure this very model, not another training of it."
        )
        return lines


def margins_left(
    model: nn.Module, report: RobustnessReport, labels: Tensor, batch_size: int
) -> Tensor:
    """(A, N) the lead of the right logit over the best wrong one in each attack's final image; NaN
    unless the image held to the end against every attack."""
    summaries = list(report.attacks.values())
    held = torch.stack([summary.robust & summary.decided for summary in summaries]).all(0)
    margins = torch.full((len(summaries), len(held)), float("nan"))
    if not bool(held.any()):
        return margins
    device = next(model.parameters(), torch.zeros(0)).device
    margins[:, held] = torch.stack(
        [_margins(model, summary, held, labels, batch_size, device) for summary in summaries]
    )
    return margins


@torch.no_grad()
def _margins(
    model: nn.Module,
    summary: AttackSummary,
    held: Tensor,
    labels: Tensor,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    assert summary.adversarial is not None
    logits = torch.cat(
        [
            model(part.to(device)).float().cpu()
            for part in summary.adversarial[held].split(batch_size)
        ]
    )
    right = labels[held].unsqueeze(1)
    return (
        logits.gather(1, right) - logits.scatter(1, right, float("-inf")).amax(1, keepdim=True)
    ).squeeze(1)


def _share(robust: Tensor) -> Proportion:
    return Proportion(int(robust.sum()), len(robust))
