"""The report of an evaluation: what held, with confidence intervals."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.evaluation.findings.accuracy import Accuracy, Known, numbers_of, share
from ironmoe.attacks.evaluation.findings.flag import Flag, counted_states
from ironmoe.attacks.evaluation.findings.idle import idle_attacks
from ironmoe.attacks.evaluation.findings.radius_text import check_radius
from ironmoe.attacks.evaluation.findings.summary import (
    AttackSummary,
    clean_accuracy,
    worst_accuracy,
)
from ironmoe.attacks.evaluation.findings.text import as_text
from ironmoe.attacks.evaluation.findings.verdict import radii_of_all, verdict
from ironmoe.attacks.evaluation.proportion import Proportion


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
    def clean_accuracy(self) -> Known:
        """Of the images that are not skipped; of a random model, the expected accuracy of a pass.
        Under targeted attacks, the share of images that are not at their target."""
        summary = next(iter(self.attacks.values()), None)
        if summary is None:
            return Proportion(int(self.clean_correct.sum()), len(self.clean_correct))
        return clean_accuracy(summary)

    @property
    def skipped(self) -> list[int]:
        """The numbers in the data of images that are left out, since nothing finite came of
        them."""
        summary = next(iter(self.attacks.values()), None)
        return [] if summary is None else summary.examples[summary.skipped].tolist()

    @property
    def skipped_under_attack(self) -> list[int]:
        """Those of ``skipped`` for which the model is finite without an attack: an attacker who is
        free to do so drives it to NaN."""
        summary = next(iter(self.attacks.values()), None)
        return [] if summary is None else summary.examples[self._driven_to_nan].tolist()

    def if_skipped_fell_at(self, eps: float | None) -> Accuracy:
        """The worst case at one radius that all attacks have, or with None at the largest one of
        each, with ``skipped_under_attack`` counted, too: as fallen from the radius on at which an
        attack drove the model to NaN, and as robust below it."""
        return worst_accuracy(list(self.attacks.values()), eps, if_skipped_fell=True)

    @property
    def _driven_to_nan(self) -> Tensor:
        """(N,) bool."""
        driven = torch.zeros_like(self.clean_correct)
        for summary in self.attacks.values():
            driven |= summary.skipped_under_attack
        return driven

    @property
    def worst_case(self) -> Accuracy:
        """Right on the clean image and under every attack at its largest eps: the number to report
        for the set of attacks. Of a random model, the expected accuracy of a pass under the attack
        that is best at each image; one half of the passes chooses it, the other one counts, so that
        the choice among many attacks makes nothing worse than it is. An ``AccuracyRange`` where a
        budget left images undecided."""
        return worst_accuracy(list(self.attacks.values()))

    def worst_case_at(self, eps: float) -> Accuracy:
        """The same at one radius that all attacks have. ValueError: they do not all have it."""
        if self.attacks:
            check_radius(eps, radii_of_all(self))
        return worst_accuracy(list(self.attacks.values()), eps)

    @property
    def passes(self) -> int:
        """How many passes of the model each verdict rests on."""
        return max((summary.passes for summary in self.attacks.values()), default=1)

    @property
    def verdict(self) -> str:
        """What the numbers come to, in one sentence, with what speaks against trusting them."""
        return verdict(self)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON; docs/results.md says what each key means."""
        return {
            "verdict": self.verdict,
            "clean": numbers_of(self.clean_accuracy),
            "worst_case": numbers_of(self.worst_case),
            "seconds": self.seconds,
            "complete": self.complete,
            "unread": self.unread,
            "skipped": self.skipped,
            "skipped_under_attack": self.skipped_under_attack,
            "if_skipped_fell": [
                {"eps": eps} | numbers_of(self.if_skipped_fell_at(eps))
                for eps in radii_of_all(self)
            ],
            "passes": self.passes,
            "search_model": self.search_model,
            "could_find_nothing": idle_attacks(self.attacks),
            "attacks": {name: summary.as_dict() for name, summary in self.attacks.items()},
            "checks": [flag.as_dict() for flag in self.checks],
        }

    def __str__(self) -> str:
        """A table to read first; ``as_dict`` has all numbers."""
        return as_text(self)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "incomplete"
        skipped = f" and {len(self.skipped)} skipped" if self.skipped else ""
        return (
            f"RobustnessReport({self.clean_accuracy.total} images{skipped}, clean "
            f"{share(self.clean_accuracy)}, worst case {share(self.worst_case)}, {state}, "
            f"{counted_states(self.checks)})"
        )
