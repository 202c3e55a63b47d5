"""The report of an evaluation: what held, with confidence intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.evaluation.expected import Accuracy, ExpectedAccuracy
from ironmoe.attacks.evaluation.proportion import Proportion


class Flag(NamedTuple):
    """What one check says: its name, whether it tripped, the number that this rests on, what it
    means in plain words, and whether the check could look at all."""

    name: str
    tripped: bool
    value: float
    message: str
    looked_at: bool = True

    @classmethod
    def not_looked_at(cls, name: str, why: str) -> "Flag":
        """Of a check that had nothing to look at: it neither tripped nor passed."""
        return cls(name, False, 0.0, f"Not looked at: {why}", looked_at=False)

    @property
    def state(self) -> str:
        """ "tripped", "passed" or "not looked at"."""
        return "tripped" if self.tripped else "passed" if self.looked_at else "not looked at"


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
        checksum, the CRC-32 of image, label and further inputs (−1 where it is not known)
    targeted: labels are the classes to reach
    box: how far apart two images in ``bounds`` can be, in the attack's norm
    blind: the names of the stages that ask for no gradients
    still: no element of an image may change, at the largest radius
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
    targeted: bool = False
    box: float = float("inf")
    blind: tuple[str, ...] = ()
    still: bool = False
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
    def eps(self) -> tuple[float, ...]:
        """The radii, ascending."""
        return tuple(dict.fromkeys(eps for eps, _ in self.stages))

    @property
    def robust(self) -> Tensor:
        """(N,) bool: right, and nothing was found up to the largest eps. An undecided image counts
        as robust: see ``undecided``."""
        return self.robust_at(self.eps[-1])

    def robust_at(self, eps: float) -> Tensor:
        """(N,) bool at one of the radii."""
        return self.clean_correct & ~(self.fell & (self.fell_at <= eps))

    def undecided_at(self, eps: float) -> Tensor:
        """(N,) bool: the budget ended before an attack of this radius had run to its end."""
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
        """At the largest eps; of a random model, the expected accuracy of a pass."""
        return self.robust_accuracy_at(self.eps[-1])

    def robust_accuracy_at(self, eps: float) -> Accuracy:
        """At one of the radii."""
        return worst_accuracy([self], eps)

    @property
    def curve(self) -> dict[float, Accuracy]:
        """eps → robust accuracy."""
        return {eps: self.robust_accuracy_at(eps) for eps in self.eps}

    def hits_at(self, eps: float) -> Tensor:
        """(N, 2) int64, of a random model, at the best point found up to this radius."""
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
            "robust": self.robust_accuracy.as_dict(),
            "curve": [
                {"eps": eps, "undecided": int(self.undecided_at(eps).sum())} | share.as_dict()
                for eps, share in self.curve.items()
            ],
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
        return ", ".join(f"{accuracy} at eps {eps:.6g}" for eps, accuracy in self.curve.items())


def _mean(figures: Tensor | None, counted: Tensor) -> float | None:
    mean = math.nan if figures is None else float(figures[counted].mean())
    return mean if math.isfinite(mean) else None


def worst_accuracy(summaries: Sequence[AttackSummary], eps: float | None = None) -> Accuracy:
    """Under all of these attacks at once, at one radius that all have, or each at its largest."""
    if not summaries:
        return Proportion(0, 0)

    radii = [summary.eps[-1] if eps is None else eps for summary in summaries]
    counted = ~summaries[0].skipped
    passes = summaries[0].passes
    if passes > 1:
        hits = torch.stack([s.hits_at(at) for s, at in zip(summaries, radii, strict=True)])
        chosen = hits[..., 0].argmax(0, keepdim=True)
        return _expected(hits[..., 1].gather(0, chosen)[0][counted], summaries[0])

    robust = torch.stack([s.robust_at(at) for s, at in zip(summaries, radii, strict=True)]).all(0)
    return Proportion(int(robust[counted].sum()), int(counted.sum()))


def _expected(hits: Tensor, summary: AttackSummary) -> ExpectedAccuracy:
    """hits (n,) of the second half of the passes; what is no hit is right."""
    passes = summary.passes // 2
    return ExpectedAccuracy(passes - hits, passes, summary.alike)


@dataclass(repr=False)
class RobustnessReport:
    """``clean_correct`` (N,) bool, a summary of every attack by name, and what the checks against
    false security say.

    seconds: how long the attacks took together in this call, without the checks; they share one
        queue
    complete: False if a budget ended the evaluation before every image was decided
    unread: how many images it did not come to, if the length of the data is known; no other number
        counts them
    search_model: what the model is called that the attacks searched on, if it is another one than
        the one that was evaluated: a transfer, in which images that hold may fall to an attack on
        the model itself
    """

    clean_correct: Tensor
    attacks: dict[str, AttackSummary] = field(default_factory=dict)
    checks: list[Flag] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = True
    unread: int = 0
    search_model: str | None = None

    @property
    def clean_accuracy(self) -> Accuracy:
        """Of the images that are not skipped; of a random model, the expected accuracy of a pass.
        Under targeted attacks, the share of images that are not at their target."""
        summary = next(iter(self.attacks.values()), None)
        if summary is None:
            return Proportion(int(self.clean_correct.sum()), len(self.clean_correct))
        if summary.passes > 1:
            return _expected(summary.hits[~summary.skipped][:, 0, 1], summary)
        right = summary.clean_correct[~summary.skipped]
        return Proportion(int(right.sum()), len(right))

    @property
    def skipped(self) -> list[int]:
        """The numbers in the data of images that are left out, since nothing finite came of
        them."""
        summary = next(iter(self.attacks.values()), None)
        return [] if summary is None else summary.examples[summary.skipped].tolist()

    @property
    def worst_case(self) -> Accuracy:
        """Right on the clean image and under every attack at its largest eps: the number to report
        for the set of attacks. Of a random model, the expected accuracy of a pass under the attack
        that is best at each image; one half of the passes chooses it, the other one counts, so that
        the choice among many attacks makes nothing worse than it is."""
        return worst_accuracy(list(self.attacks.values()))

    def worst_case_at(self, eps: float) -> Accuracy:
        """The same at one radius that all attacks have."""
        return worst_accuracy(list(self.attacks.values()), eps)

    @property
    def passes(self) -> int:
        """How many passes of the model each verdict rests on."""
        return max((summary.passes for summary in self.attacks.values()), default=1)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return {
            "clean": self.clean_accuracy.as_dict(),
            "worst_case": self.worst_case.as_dict(),
            "seconds": self.seconds,
            "complete": self.complete,
            "unread": self.unread,
            "skipped": self.skipped,
            "passes": self.passes,
            "search_model": self.search_model,
            "attacks": {name: summary.as_dict() for name, summary in self.attacks.items()},
            "checks": [flag._asdict() for flag in self.checks],
        }

    def __repr__(self) -> str:
        """What to read first; ``as_dict`` has all numbers."""
        images = self.clean_accuracy.total
        lines = [f"clean accuracy {self.clean_accuracy} of {images} images"]
        lines += [f"{name}: {summary}" for name, summary in self.attacks.items()]
        lines.append(f"worst case: {self.worst_case}")
        if not self.complete:
            lines.append("A budget ended this before every image was decided.")
        lines += [f"{flag.name}: {flag.message}" for flag in self.checks if flag.tripped]
        return "\n".join(lines)
