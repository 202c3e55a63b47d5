"""Claim 3: a mixture of experts is smoother than a dense model, at the images themselves."""

from collections.abc import Mapping

from ironmoe.bench.study.claims.parts.against_dense import against_dense, difference
from ironmoe.bench.study.claims.parts.blind import blind
from ironmoe.bench.study.claims.parts.claim import Claim, Findings
from ironmoe.bench.study.claims.parts.contrast import effect
from ironmoe.bench.study.claims.parts.evidence import Evidence
from ironmoe.bench.study.claims.parts.ladders import described
from ironmoe.bench.study.claims.parts.outcomes import (
    JACOBIAN,
    LEAST_EPS,
    RADIUS,
    WITHIN,
    title,
)
from ironmoe.bench.study.claims.parts.slopes import GATES, ladder_over_experts, slope_contrast
from ironmoe.bench.study.claims.parts.units import RATIO
from ironmoe.bench.study.claims.parts.verdict import Effect
from ironmoe.bench.study.claims.parts.words import compared, interval, left_out, listed
from ironmoe.bench.study.ladder.arms import Arm

FREE = ":free"  # routing
SECANT = "slope@"


def _look(evidence: Evidence) -> Findings:
    """The first-order radius decides. A Lipschitz constant of logits cannot compare two models:
    logits twice as large have twice the constant and the same decisions. Their ‖J‖ stands beside,
    and so do the other arms and the trends of r₁ over E; and what lies beyond the tangent, where
    experts are swapped: the least radius, secants and curvature."""
    found = against_dense(evidence, RADIUS)
    if found.primary is None or found.reference is None or found.dense is None:
        return Findings([], [], [], found.missing)

    pair = found.reference, found.dense
    jacobian = difference(evidence, JACOBIAN, *pair, "exploratory")
    control = [] if found.control is None else [found.control]
    beside = [] if jacobian is None else [jacobian]
    farther = {key: difference(evidence, key, *pair, "secondary") for key in _beyond(evidence)}
    measured = {key: each for key, each in farther.items() if each is not None}
    trends = [
        slope_contrast(
            evidence, RADIUS, ladder_over_experts(evidence, RADIUS, renormalize=kind), "secondary"
        )
        for kind in GATES
    ]
    sentences = [
        _sentence(effect(found.primary), *pair),
        *(_control(each) for each in control),
        *(_beside(each) for each in beside),
        *_farther(measured),
        *left_out(found.left_out),
    ]
    slopes = [effect(each) for each in trends if each is not None]
    others = [*control, *found.others, *slopes, *beside, *measured.values()]
    return Findings([found.primary], others, sentences, [], blind=blind(evidence, pair))


def _beyond(evidence: Evidence) -> list[str]:
    """The numbers of the free model that tell of more than its tangent, from near to far."""
    within = [
        key
        for key in evidence.value_names()
        if key.partition("@")[0] in WITHIN and key.endswith(FREE)
    ]
    return [LEAST_EPS, *within]


def _sentence(found: Effect, arm: Arm, dense: Arm) -> str:
    much = compared(found, RATIO, "{} larger than", "{} smaller than", "as large as")
    return (
        f"The first-order radius r₁, 0 for wrong images, of {described(arm)} is {much} that of "
        f"{described(dense)} {interval(found, RATIO)}."
    )


def _control(found: Effect) -> str:
    return f"With gates that sum to 1 it is {_much(found)} {interval(found, RATIO)}."


def _beside(found: Effect) -> str:
    return (
        f"‖J‖ of the logits, which also measures how large logits are, is {_much(found)} "
        f"{interval(found, RATIO)}."
    )


def _farther(measured: Mapping[str, Effect]) -> list[str]:
    """What the least radius and the largest secants are, beside the tangent."""
    secants = [key for key in measured if key.startswith(SECANT)]
    texts = [
        f"{name} is {_much(measured[key])} {interval(measured[key], RATIO)}"
        for key, name in (
            (LEAST_EPS, "the least radius at which FAB finds another class"),
            *((key, f"the {title(key)}") for key in secants[-1:]),
        )
        if key in measured
    ]
    if not texts:
        return []
    return [f"This is about tangents alone. Beyond them, where experts may swap, {listed(texts)}."]


def _much(found: Effect) -> str:
    return compared(found, RATIO, "{} larger", "{} smaller", "as large")


SMOOTHNESS = Claim(
    key="smoothness",
    sentence=(
        "A V-MoE is smoother than a dense ViT: by the tangents of the logits, images are farther "
        "from another class."
    ),
    direction=1,
    look=_look,
)
