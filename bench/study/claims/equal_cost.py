"""Claim 1: at equal cost a mixture of experts is more robust than a dense model."""

from ironmoe.bench.study.claims.parts.against_dense import against_dense, difference
from ironmoe.bench.study.claims.parts.blind import blind
from ironmoe.bench.study.claims.parts.claim import Claim, Findings
from ironmoe.bench.study.claims.parts.contrast import effect
from ironmoe.bench.study.claims.parts.evidence import Evidence
from ironmoe.bench.study.claims.parts.ladders import described
from ironmoe.bench.study.claims.parts.outcomes import AREA, LEAST_EPS, is_accuracy
from ironmoe.bench.study.claims.parts.units import POINTS
from ironmoe.bench.study.claims.parts.verdict import Effect
from ironmoe.bench.study.claims.parts.words import compared, interval, left_out
from ironmoe.bench.study.ladder.arms import Arm


def _look(evidence: Evidence) -> Findings:
    """The area under the curve of robust accuracy decides, which runs scatter less in than in the
    accuracy at any one radius, and which picks no radius."""
    found = against_dense(evidence, AREA)
    if found.primary is None or found.reference is None or found.dense is None:
        return Findings([], [], [], found.missing)

    keys = [key for key in evidence.value_names() if is_accuracy(key) or key == LEAST_EPS]
    rows = [difference(evidence, key, found.reference, found.dense, "secondary") for key in keys]
    control = [] if found.control is None else [found.control]
    others = [*control, *found.others, *(row for row in rows if row is not None)]
    sentences = [
        _sentence(effect(found.primary), found.reference, found.dense),
        *(_control(each) for each in control),
        *left_out(found.left_out),
    ]
    ends = blind(evidence, (found.reference, found.dense), outcome=AREA)
    return Findings([found.primary], others, sentences, [], blind=ends)


def _sentence(found: Effect, arm: Arm, dense: Arm) -> str:
    much = compared(
        found,
        POINTS,
        "{} more accuracy under attack than",
        "{} less accuracy under attack than",
        "as much accuracy under attack as",
    )
    return (
        f"At equal cost {described(arm)} keeps {much} {described(dense)}, on average over the "
        f"radii {interval(found, POINTS)}."
    )


def _control(found: Effect) -> str:
    much = compared(found, POINTS, "{} more", "{} less", "as much")
    return f"With gates that sum to 1 it is {much} {interval(found, POINTS)}."


EQUAL_COST = Claim(
    key="equal cost",
    sentence="At equal cost a V-MoE is more robust than a dense ViT.",
    direction=1,
    look=_look,
)
