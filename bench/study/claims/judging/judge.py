"""From what claims found to verdicts in words."""

from collections.abc import Sequence
from math import isnan
from typing import NamedTuple

from ironmoe.bench.study.claims.judging.needed import runs_to_decide
from ironmoe.bench.study.claims.judging.reasons import Judged, reason_in_words
from ironmoe.bench.study.claims.judging.rules import (
    LEVEL,
    PValues,
    corrected,
    p_values,
    reason,
)
from ironmoe.bench.study.claims.parts.claim import Claim, Findings
from ironmoe.bench.study.claims.parts.contrast import Tested, effect_of, tested
from ironmoe.bench.study.claims.parts.evidence import Evidence
from ironmoe.bench.study.claims.parts.verdict import BECAUSE, Verdict


class _Asked(NamedTuple):
    claim: Claim
    findings: Findings
    tests: list[Tested]


def judged(claims: Sequence[Claim], evidence: Evidence, training: str) -> list[Verdict]:
    """The verdicts on these claims, corrected for being so many."""
    asked = []
    for claim in claims:
        findings = claim.look(evidence)
        asked.append(_Asked(claim, findings, [tested(each) for each in findings.primary]))

    p = {each.claim.key: p_values(each.tests, each.claim.direction) for each in asked}
    count = sum(not isnan(values.so) for values in p.values())
    after = corrected(p)
    return [_verdict(each, after[each.claim.key], max(1, count), training) for each in asked]


def _verdict(asked: _Asked, p: PValues, count: int, training: str) -> Verdict:
    claim, findings, tests = asked
    if not tests:
        return _not_measured(asked, training)

    because = reason(tests, claim.direction, p, findings)
    undecided = BECAUSE[because] == "undecided"
    open_question = undecided and because not in ("few runs", "confounded", "blind")
    needed = runs_to_decide(tests, claim.direction, LEVEL / count) if open_question else None
    decision = Judged(claim.direction, because, tests, p, count, needed, findings)

    primary = [effect_of(test, _decisive(p, because, claim.direction)) for test in tests]
    return Verdict(
        claim=claim.key,
        sentence=claim.sentence,
        training=training,
        verdict=BECAUSE[because],
        because=because,
        words=" ".join([*findings.sentences, *reason_in_words(decision), *_missing(findings)]),
        effects=(*primary, *findings.others),
        runs=min(test.paired.runs for test in tests),
        runs_needed=needed,
        missing=tuple(findings.missing),
    )


def _decisive(p: PValues, because: str, direction: int) -> float:
    """The p-value of the rule that decided; without one that of an effect."""
    match because:
        case "no difference":
            return p.equal
        case "opposite" | "change":
            return p.opposite
    return p.equal if direction == 0 else min(p.so, p.opposite)


def _not_measured(asked: _Asked, training: str) -> Verdict:
    claim, findings, _ = asked
    return Verdict(
        claim=claim.key,
        sentence=claim.sentence,
        training=training,
        verdict="not measured",
        because="not measured",
        words=" ".join(_missing(findings)),
        effects=tuple(findings.others),
        runs=0,
        runs_needed=None,
        missing=tuple(findings.missing),
    )


def _missing(findings: Findings) -> list[str]:
    return [f"Missing: {'; '.join(findings.missing)}."] if findings.missing else []
