"""Claim 3: a mixture of experts is smoother than a dense model."""

from ironmoe.bench.study.claims.parts.against_dense import against_dense, difference
from ironmoe.bench.study.claims.parts.claim import Claim, Findings
from ironmoe.bench.study.claims.parts.contrast import effect
from ironmoe.bench.study.claims.parts.evidence import Evidence
from ironmoe.bench.study.claims.parts.ladders import described
from ironmoe.bench.study.claims.parts.outcomes import JACOBIAN, RADIUS
from ironmoe.bench.study.claims.parts.slopes import GATES, ladder_over_experts, slope_contrast
from ironmoe.bench.study.claims.parts.units import RATIO
from ironmoe.bench.study.claims.parts.verdict import Effect
from ironmoe.bench.study.claims.parts.words import compared, interval, left_out
from ironmoe.bench.study.ladder.arms import Arm


def _look(evidence: Evidence) -> Findings:
    """The first-order radius decides. A Lipschitz constant of logits cannot compare two models:
    logits twice as large have twice the constant and the same decisions. Their ‖J‖ stands beside,
    and so do the other arms and the trends of r₁ over E."""
    found = against_dense(evidence, RADIUS)
    if found.primary is None or found.reference is None or found.dense is None:
        return Findings([], [], [], found.missing)

    jacobian = difference(evidence, JACOBIAN, found.reference, found.dense, "exploratory")
    control = [] if found.control is None else [found.control]
    beside = [] if jacobian is None else [jacobian]
    trends = [
        slope_contrast(
            evidence, RADIUS, ladder_over_experts(evidence, RADIUS, renormalize=kind), "secondary"
        )
        for kind in GATES
    ]
    sentences = [
        _sentence(effect(found.primary), found.reference),
        *(_control(each) for each in control),
        *(_beside(each) for each in beside),
        *left_out(found.left_out),
    ]
    slopes = [effect(each) for each in trends if each is not None]
    others = [*control, *found.others, *slopes, *beside]
    return Findings([found.primary], others, sentences, [])


def _sentence(found: Effect, arm: Arm) -> str:
    much = compared(found, RATIO, "{} larger than", "{} smaller than", "as large as")
    return (
        f"The first-order radius r₁ of {described(arm)} is {much} that of the dense ViT "
        f"{interval(found, RATIO)}."
    )


def _control(found: Effect) -> str:
    much = compared(found, RATIO, "{} larger", "{} smaller", "as large")
    return f"With gates that sum to 1 it is {much} {interval(found, RATIO)}."


def _beside(found: Effect) -> str:
    much = compared(found, RATIO, "{} larger", "{} smaller", "as large")
    return (
        f"‖J‖ of the logits, which also measures how large logits are, is {much} "
        f"{interval(found, RATIO)}."
    )


SMOOTHNESS = Claim(
    key="smoothness",
    sentence="A V-MoE is smoother than a dense ViT: decisions change more slowly with the image.",
    direction=1,
    look=_look,
)
