"""Claim 2: robustness grows with the number of experts at equal cost."""

from collections.abc import Mapping, Sequence

from ironmoe.bench.study.claims.parts.blind import blind
from ironmoe.bench.study.claims.parts.claim import Claim, Findings
from ironmoe.bench.study.claims.parts.contrast import Contrast, effect
from ironmoe.bench.study.claims.parts.evidence import Evidence
from ironmoe.bench.study.claims.parts.ladders import choice_ladder, expert_ladder
from ironmoe.bench.study.claims.parts.outcomes import AREA, GATE_SUM
from ironmoe.bench.study.claims.parts.slopes import (
    GATES,
    Ladder,
    ladder_over_experts,
    slope_contrast,
)
from ironmoe.bench.study.claims.parts.units import POINTS
from ironmoe.bench.study.claims.parts.verdict import Effect
from ironmoe.bench.study.claims.parts.words import compared, interval, left_out, number
from ironmoe.bench.study.ladder.arms import Arm

CONFOUNDED = (
    "What a token's gates sum to differs with the number of experts where they are those of the "
    "source: this may be the scale of the gates and not the number of experts, which a ladder with "
    "gates that sum to 1 would tell."
)
ONLY_RENORMALIZED = "The models of the paper have the gates of the source."


def _look(evidence: Evidence) -> Findings:
    """The slope of the area under the robust curve in log₂ E among models with experts decides, as
    what it comes to between the fewest experts and the most. Both kinds of gates have to agree,
    because the source's weigh less the more experts there are."""
    ladders = {
        renormalize: ladder_over_experts(evidence, AREA, renormalize=renormalize)
        for renormalize in GATES
    }
    primary: dict[bool, Contrast] = {}
    for renormalize, ladder in ladders.items():
        contrast = slope_contrast(evidence, AREA, ladder, "primary")
        if contrast is not None:
            primary[renormalize] = contrast

    missing = _missing(evidence, primary)
    if not primary:
        return Findings([], [], [], missing)

    effects = {renormalize: effect(contrast) for renormalize, contrast in primary.items()}
    sentences = [_sentence(found, ladders[kind]) for kind, found in effects.items()]
    sentences += _scale(evidence, ladders[False].arms, effects)
    used = set.union(*(set(contrast.by_seed) for contrast in primary.values()))
    arms = list(dict.fromkeys(arm for kind in primary for arm in ladders[kind].arms))
    sentences += left_out(evidence.seeds(arms) - used)

    confounded = "" if len(primary) == 2 else CONFOUNDED if False in primary else ONLY_RENORMALIZED
    ends = blind(evidence, arms, outcome=AREA)
    return Findings(
        list(primary.values()), _choices(evidence), sentences, missing, confounded, ends
    )


def _missing(evidence: Evidence, primary: Mapping[bool, Contrast]) -> list[str]:
    """Arms without the outcome, and ladders that have no two arms with a common seed."""
    declared = [
        arm for kind in (False, True) for arm in expert_ladder(evidence.arms, renormalize=kind)
    ]
    arms = [arm for arm in dict.fromkeys(declared) if not evidence.by_seed(arm, AREA, POINTS)]
    ladders = [
        f"a ladder of E with {gates}: two arms at least, and a seed that all of them have"
        for renormalize, gates in GATES.items()
        if renormalize not in primary
    ]
    return [evidence.lacking(arm, AREA) for arm in arms] + ladders


def _sentence(found: Effect, ladder: Ladder) -> str:
    much = compared(found, POINTS, "rises by {}", "falls by {}", "stays as it is")
    return (
        f"From {ladder.numbers[0]} to {ladder.numbers[-1]} experts at equal cost, with "
        f"{ladder.setting}, the accuracy under attack {much} on average over the radii "
        f"{interval(found, POINTS)}."
    )


def _scale(evidence: Evidence, source: Sequence[Arm], effects: Mapping[bool, Effect]) -> list[str]:
    """That only one of the two ladders shows a rise, if so, and what the gates sum to."""
    if len(effects) < 2 or not effects[False].low > 0:
        return []
    other = effects[True]
    if not other.low <= 0 or other.mean >= effects[False].mean:
        return []

    sums = [evidence.mean(arm, GATE_SUM) for arm in (source[0], source[-1])]
    fall = ""
    if None not in sums:
        first, last = (number(value, 2) for value in sums if value is not None)
        fall = (
            f", which sum to {first} with {source[0].experts} experts and to {last} with "
            f"{source[-1].experts}"
        )
    return [
        f"Only the gates of the source show a rise: it may come from the scale of the gates{fall}, "
        "and not from the number of experts."
    ]


def _choices(evidence: Evidence) -> list[Effect]:
    """K in place of E: no part of the claim."""
    found = []
    for renormalize, gates in GATES.items():
        for equal_width, cost in ((False, "equal cost"), (True, "equal width of an expert")):
            declared = choice_ladder(
                evidence.arms, renormalize=renormalize, equal_width=equal_width
            )
            arms = [arm for arm in declared if evidence.by_seed(arm, AREA, POINTS)]
            ladder = Ladder(arms, [arm.top_k for arm in arms], "K", f"{cost}, {gates}")
            contrast = slope_contrast(evidence, AREA, ladder, "exploratory")
            found += [] if contrast is None else [effect(contrast)]
    return found


MORE_EXPERTS = Claim(
    key="more experts",
    sentence=(
        "At equal cost a V-MoE is more robust the more experts it has, and not only because its "
        "gates weigh less."
    ),
    direction=1,
    look=_look,
)
