"""The claims in their order, and the verdict on each."""

from collections.abc import Iterable, Sequence

from ironmoe.bench.study.claims.choice_of_experts import CHOICE_OF_EXPERTS
from ironmoe.bench.study.claims.different_experts import DIFFERENT_EXPERTS
from ironmoe.bench.study.claims.equal_cost import EQUAL_COST
from ironmoe.bench.study.claims.judging.judge import judged
from ironmoe.bench.study.claims.more_experts import MORE_EXPERTS
from ironmoe.bench.study.claims.parts.claim import Claim
from ironmoe.bench.study.claims.parts.evidence import Evidence
from ironmoe.bench.study.claims.parts.verdict import Verdict
from ironmoe.bench.study.claims.smoothness import SMOOTHNESS
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.statistics.measured import Measured

CLAIMS: tuple[Claim, ...] = (
    EQUAL_COST,
    MORE_EXPERTS,
    SMOOTHNESS,
    DIFFERENT_EXPERTS,
    CHOICE_OF_EXPERTS,
)
"""A new claim is a file with a ``Claim`` and a line here."""


def verdicts(
    measured: Iterable[Measured],
    arms: Sequence[Arm],
    *,
    claims: Sequence[Claim] = CLAIMS,
    chance: float = 0.0,
) -> list[Verdict]:
    """The verdict on every claim, for each training by itself, in the order in which trainings
    first come.

    Holm's correction goes over the claims of one training: ordinary and adversarial training are
    two studies of the same claims, each with its own family-wise 5 %.

    Args:
        measured: all runs, of any arms among ``arms``.
        arms: what the names of arms stand for.
        claims: which of them; fewer claims need less correction, so choose before you look.
        chance: the accuracy of guessing, at which models say nothing.

    Raises:
        ValueError: two runs of one arm, training and seed, runs of other arms, or two arms of one
            name.
    """
    runs: dict[str, list[Measured]] = {}
    for run in measured:
        runs.setdefault(run.training, []).append(run)
    return [
        verdict
        for training, of_training in runs.items()
        for verdict in judged(claims, Evidence(of_training, arms, chance=chance), training)
    ]
