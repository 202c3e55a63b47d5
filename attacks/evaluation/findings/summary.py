"""One attack over a whole data set: what held, image by image and in sum."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.evaluation.expected import ExpectedAccuracy
from ironmoe.attacks.evaluation.findings.accuracy import (
    Accuracy,
    AccuracyRange,
    Known,
    numbers_of,
    share,
)
from ironmoe.attacks.evaluation.findings.radius_text import check_radius
from ironmoe.attacks.evaluation.proportion import Proportion


@dataclass(repr=False)
class AttackSummary:
    """One attack over the whole data set. Tensors are on CPU, in the order of the data.

    stages: (eps, name) of each stage that an image goes through, in order
    examples: (N,) int64, the images' numbers in the data: all of them, or those that a budget let
        the evaluation come to
    clean_correct: (N,) bool, the clean image is classified as its label
    passed: (N,) int64, how many stages the image passed
    fell: (N,) bool, it did not pass the next one
    decided: (N,) bool, nothing was left to do
    prediction, distance: (N,) int64 and (N,) float64, of the final image
    steps: (N,) int64, how many queries came before the success; −1 without success
    found: (N,) bool, the search saw a success, which full precision may not have confirmed
    adversarial: (N, …), or None if not kept in memory
    kept: reads final images from the journal, if they are kept there alone; see ``final``
    flags: name → (N,) bool, as in ``AttackResult``
    forwards, backwards: how many passes of single images the attack made
    clean_figure, figure: (N,) float64, the goal's figure for the clean and for the final image; NaN
        if the goal has none
    skipped: (N,) bool, nothing finite came of this image, under this or another attack; it is left
        out of every share
    passes: how many passes of the model each verdict rests on; more than 1 for a random model
    hits: (N, P, 2) int64, for a random model: how many passes reached the goal in the first and in
        the second half of them; of the clean image, and for each radius of the best point found up
        to it, as the first half says. P is 0 for a deterministic model
    alike: how many times as much a pass varies as one whose images draw for themselves; above 1 for
        a model that draws once for a whole batch
    per_image: further (N,) columns by name: label, clean_prediction, forwards, backwards, and
        checksum, the CRC-32 of image, label and further inputs (−1 where it is not known);
        skipped_under_attack, what this attack alone says, while ``skipped`` is of all attacks
    norm: of the attack's radii and distances; "" if it is not known
    targeted: labels are the classes to reach
    box: how far apart two images in ``bounds`` can be, in the attack's norm
    blind: the names of the stages that ask for no gradients
    still: no element of an image may change, at the largest radius
    takes_steps: False if the search cannot go anywhere: it has no step, or steps of length 0
    """

    stages: tuple[tuple[float, str], ...]
    examples: Tensor
    clean_correct: Tensor
    passed: Tensor
    fell: Tensor
    decided: Tensor
    prediction: Tensor
    distance: Tensor
    steps: Tensor
    found: Tensor
    adversarial: Tensor | None
    flags: dict[str, Tensor]
    forwards: int
    backwards: int
    clean_figure: Tensor | None = None
    figure: Tensor | None = None
    skipped: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    passes: int = 1
    hits: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 2, dtype=torch.int64))
    alike: float = 1.0
    per_image: dict[str, Tensor] = field(default_factory=dict)
    norm: str = ""
    targeted: bool = False
    box: float = float("inf")
    blind: tuple[str, ...] = ()
    still: bool = False
    takes_steps: bool = True
    kept: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not len(self.skipped):
            self.skipped = torch.zeros_like(self.fell)

    def final(self, places: Tensor) -> Tensor:
        """(n, …) on CPU, the final images at some places (n,) int64, or at a mask (N,) bool.

        Raises:
            ValueError: they were not kept.
        """
        if self.adversarial is not None:
            return self.adversarial[places]
        if self.kept is None:
            raise ValueError("keep_adversarial must be given to read final images, got False")
        return self.kept(places)

    @property
    def attacked(self) -> Tensor:
        """(N,) bool: the attack asked the model about more than the clean image."""
        forwards = self.per_image.get("forwards")
        return self.clean_correct if forwards is None else forwards > self.passes

    @property
    def skipped_under_attack(self) -> Tensor:
        """(N,) bool, skipped images for which the model is finite without an attack, and which
        this attack drove to NaN or infinity."""
        own = self.per_image.get("skipped_under_attack")
        return self.skipped & (self.attacked if own is None else own)

    def driven_at(self, eps: float) -> Tensor:
        """(N,) bool, those of ``skipped_under_attack`` that the attack drove there at a radius up
        to this one. At smaller radii they held."""
        radii = torch.tensor([radius for radius, _ in self.stages], dtype=torch.float64)
        last = radii[(self.passed - 1).clamp(0, len(self.stages) - 1)]
        return self.skipped_under_attack & ~self.fell & (last <= eps)

    @property
    def eps(self) -> tuple[float, ...]:
        """The radii, ascending."""
        return tuple(dict.fromkeys(eps for eps, _ in self.stages))

    @property
    def robust(self) -> Tensor:
        """(N,) bool: right, and nothing was found up to the largest eps. An undecided image counts
        as robust: see ``undecided``."""
        return self.robust_at(self.eps[-1])

    def robust_at(self, eps: float) -> Tensor:
        """(N,) bool at one of the radii. An image that the attack drove to NaN there is not robust.
        ValueError: no attack was run at this one."""
        check_radius(eps, self.eps)
        fell = self.fell & (self.fell_at <= eps)
        return self.clean_correct & ~fell & ~self.driven_at(eps)

    def undecided_at(self, eps: float) -> Tensor:
        """(N,) bool: the budget ended before an attack of this radius had run to its end.
        ValueError: no attack was run at this one."""
        check_radius(eps, self.eps)
        stages = sum(radius <= eps for radius, _ in self.stages)
        return self.clean_correct & ~self.fell & ~self.decided & (self.passed < stages)

    @property
    def fell_at(self) -> Tensor:
        """(N,) float64: the radius at which an image fell; infinity if it did not, 0 if it was
        wrong from the start."""
        radii = torch.tensor([eps for eps, _ in self.stages], dtype=torch.float64)
        at = radii[self.passed.clamp(max=len(self.stages) - 1)]
        return torch.where(self.fell, at, torch.where(self.clean_correct, float("inf"), 0.0))

    @property
    def fell_to(self) -> dict[str, int]:
        """Stage by name → how many images fell to it; with one radius."""
        counts = {name: 0 for _, name in self.stages}
        for number in self.passed[self.fell].tolist():
            counts[self.stages[number][1]] += 1
        return counts

    @property
    def robust_accuracy(self) -> Accuracy:
        """At the largest eps; of a random model, the expected accuracy of a pass. A range where a
        budget left images undecided."""
        return self.robust_accuracy_at(self.eps[-1])

    def robust_accuracy_at(self, eps: float) -> Accuracy:
        """At one of the radii; an ``AccuracyRange`` where images are undecided. ValueError: no
        attack was run at this one."""
        return worst_accuracy([self], eps)

    @property
    def curve(self) -> dict[float, Accuracy]:
        """eps → robust accuracy: an ``AccuracyRange`` where a budget left images undecided, which
        has ``least`` and ``most`` and no ``value``."""
        return {eps: self.robust_accuracy_at(eps) for eps in self.eps}

    def hits_at(self, eps: float) -> Tensor:
        """(N, 2) int64, of a random model, at the best point found up to this radius. ValueError:
        no attack was run at this one."""
        check_radius(eps, self.eps)
        point = 1 + sum(radius < eps for radius in self.eps)
        return self.hits[:, min(point, self.hits.shape[1] - 1)]

    @property
    def mean_figures(self) -> dict[str, float | None]:
        """The goal's figure for the "clean" and for the "attacked" images, the mean over those that
        are not skipped; None if the goal has none, or for a mean that is not finite."""
        columns = {"clean": self.clean_figure, "attacked": self.figure}
        return {name: _mean(column, ~self.skipped) for name, column in columns.items()}

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return {
            "robust": numbers_of(self.robust_accuracy),
            "curve": [{"eps": eps} | numbers_of(share) for eps, share in self.curve.items()],
            "fell_to": self.fell_to,
            "figure": self.mean_figures,
            "skipped": int(self.skipped.sum()),
            "found": int((self.found & self.clean_correct).sum()),
            "confirmed": int(self.fell.sum()),
            "undecided": int((~self.decided).sum()),
            "flags": {name: int(flag.sum()) for name, flag in self.flags.items()},
            "forwards": self.forwards,
            "backwards": self.backwards,
        }

    def __repr__(self) -> str:
        curve = ", ".join(f"{share(each)} at eps {eps:.6g}" for eps, each in self.curve.items())
        return f"AttackSummary({len(self.examples)} images: {curve})"

    def __str__(self) -> str:
        return ", ".join(f"{each} at eps {eps:.6g}" for eps, each in self.curve.items())


def _mean(figures: Tensor | None, counted: Tensor) -> float | None:
    mean = math.nan if figures is None else float(figures[counted].mean())
    return mean if math.isfinite(mean) else None


def clean_accuracy(summary: AttackSummary) -> Known:
    """Of the images that are not skipped; of a random model, the expected accuracy of a pass."""
    if summary.passes > 1:
        return _expected(summary.hits[~summary.skipped][:, 0, 1], summary)
    right = summary.clean_correct[~summary.skipped]
    return Proportion(int(right.sum()), len(right))


def worst_accuracy(
    summaries: Sequence[AttackSummary],
    eps: float | None = None,
    *,
    if_skipped_fell: bool = False,
) -> Accuracy:
    """Under all of these attacks at once, at one radius that all have, or each at its largest. A
    range where images are undecided.

    if_skipped_fell: count images that an attack drove to NaN, too: as fallen from the radius on at
        which it did so.
    """
    if not summaries:
        return Proportion(0, 0)

    radii = [summary.eps[-1] if eps is None else eps for summary in summaries]
    pairs = list(zip(summaries, radii, strict=True))
    counted = ~summaries[0].skipped
    if if_skipped_fell:
        counted = counted | torch.stack([s.skipped_under_attack for s in summaries]).any(0)
    robust = torch.stack([s.robust_at(at) for s, at in pairs]).all(0) & counted
    most = _so_far(pairs, robust, counted)
    # An image that fell to one attack fell, whatever is not known of the others.
    open_ = torch.stack([s.undecided_at(at) for s, at in pairs]).any(0) & robust
    undecided = int(open_.sum())
    return AccuracyRange(most, undecided) if undecided else most


def _so_far(
    pairs: Sequence[tuple[AttackSummary, float]],
    robust: Tensor,
    counted: Tensor,
) -> Known:
    """The accuracy if all that is undecided holds."""
    first = pairs[0][0]
    if first.passes == 1:
        return Proportion(int(robust.sum()), int(counted.sum()))
    hits = torch.stack([summary.hits_at(at) for summary, at in pairs])
    chosen = hits[..., 0].argmax(0, keepdim=True)
    hits = hits[..., 1].gather(0, chosen)[0]
    driven = torch.stack([summary.driven_at(at) for summary, at in pairs]).any(0)
    hits = hits.masked_fill(driven, first.passes // 2)
    return _expected(hits[counted], first)


def _expected(hits: Tensor, summary: AttackSummary) -> ExpectedAccuracy:
    """hits (n,) of the second half of the passes; what is no hit is right."""
    passes = summary.passes // 2
    return ExpectedAccuracy(passes - hits, passes, summary.alike)
