"""Claim 5: models are robust to the choice of experts."""

from ironmoe.bench.study.claims.parts.blind import blind
from ironmoe.bench.study.claims.parts.claim import Claim, Findings
from ironmoe.bench.study.claims.parts.contrast import Contrast, effect
from ironmoe.bench.study.claims.parts.evidence import Evidence
from ironmoe.bench.study.claims.parts.ladders import deciding_arm, described, twin_arm
from ironmoe.bench.study.claims.parts.outcomes import CLEAN
from ironmoe.bench.study.claims.parts.units import POINTS
from ironmoe.bench.study.claims.parts.verdict import Effect, Role
from ironmoe.bench.study.claims.parts.words import compared, interval, left_out
from ironmoe.bench.study.ladder.arms import Arm

CHOSEN = {
    "drop best, same sum": "the experts of ranks 2 to K + 1",
    "random, same sum": "random experts",
}
"""Interventions that decide. Only the identity of the experts changes: what their gates sum to
stays, and with it how much they weigh beside the rest of the model."""

OWN = "none"  # no intervention
IMAGES = {CLEAN: "clean", "attacked": "adversarial"}
"""What numbers "intervention:images" are measured on."""


def _look(evidence: Evidence) -> Findings:
    """Accuracy on clean images with other experts decides, minus that with the router's own. On
    adversarial images, made for the router's own choice, any change of the model may help or hurt:
    such rows stand beside, and so do all other interventions and the twin whose gates sum to 1."""
    arm = deciding_arm(evidence.arms, at_any_cost=True)
    if arm is None:
        return Findings([], [], [], ["an arm with experts"])

    if arm.experts == arm.top_k:
        none_left = f"another choice: every token of {arm.name} takes all experts"
        return Findings([], [], [], [none_left])

    primary = {name: _change(evidence, arm, name, CLEAN, "primary") for name in CHOSEN}
    measured = {name: found for name, found in primary.items() if found is not None}
    if len(measured) < len(CHOSEN):
        return Findings([], [], [], _missing(evidence, arm))

    rows = [
        _change(evidence, arm, name, images, "secondary")
        for name, images in _measured(evidence)
        if (name, images) not in {(chosen, CLEAN) for chosen in CHOSEN}
    ]
    twin = twin_arm(evidence.arms, arm)
    if twin is not None:
        rows = [_change(evidence, twin, name, CLEAN, "control") for name in CHOSEN] + rows

    sentences = [_sentence(effect(found), arm, name) for name, found in measured.items()]
    used = set.intersection(*(set(found.by_seed) for found in measured.values()))
    sentences += left_out(evidence.seeds([arm]) - used)
    others = [effect(row) for row in rows if row is not None]
    return Findings(list(measured.values()), others, sentences, [], blind=blind(evidence, [arm]))


def _measured(evidence: Evidence) -> list[tuple[str, str]]:
    """Each intervention with the images that its accuracy was measured on."""
    pairs = [tuple(key.split(":")) for key in evidence.value_names()]
    return [
        (pair[0], pair[1])
        for pair in pairs
        if len(pair) == 2 and pair[1] in IMAGES and pair[0] != OWN
    ]


def _change(
    evidence: Evidence, arm: Arm, intervention: str, images: str, role: Role
) -> Contrast | None:
    """Accuracy under an intervention minus accuracy without one, of the same runs."""
    by_seed = evidence.differences(
        f"{intervention}:{images}", POINTS, arm, arm, other_key=f"{OWN}:{images}"
    )
    if not by_seed:
        return None
    label = f"accuracy on {IMAGES[images]} images, {intervention} − own choice: {arm.name}"
    return Contrast(label, role, POINTS, by_seed, CHOSEN.get(intervention, intervention))


def _missing(evidence: Evidence, arm: Arm) -> list[str]:
    keys = [f"{name}:{CLEAN}" for name in (OWN, *CHOSEN)]
    lacking = [key for key in keys if not evidence.by_seed(arm, key, POINTS)]
    return list(dict.fromkeys(evidence.lacking(arm, key) for key in lacking)) or [
        f"{' and '.join(keys)} of {arm.name} with a common seed"
    ]


def _sentence(found: Effect, arm: Arm, intervention: str) -> str:
    much = compared(found, POINTS, "gains {} of", "loses {} of", "neither gains nor loses")
    return (
        f"With {CHOSEN[intervention]} at the same sum of gates, {described(arm)} {much} clean "
        f"accuracy {interval(found, POINTS)}."
    )


CHOICE_OF_EXPERTS = Claim(
    key="choice of experts",
    sentence=(
        "Models are robust to the choice of experts: other experts in place of the router's change "
        "accuracy by less than 2 points."
    ),
    direction=0,
    look=_look,
)
