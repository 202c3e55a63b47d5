"""The verdicts as tables: one line for each claim and training, and all contrasts of each."""

from collections.abc import Sequence
from math import isnan
from typing import NamedTuple

from ironmoe.bench.common.files import slug
from ironmoe.bench.reports.tables import Column, cells
from ironmoe.bench.study.claims.parts.verdict import Effect, Verdict
from ironmoe.bench.study.report.cells import DASH, effect_text, interval_text, p_cell

DECIDING = ("primary", "control")
"""Roles whose contrasts stand on the page; the others are folded away."""


NO_BREAK = "\N{NO-BREAK SPACE}"
SHORT = 12  # characters that stay in one line


class EffectLine(NamedTuple):
    """A primary contrast in the table of claims."""

    effect: str
    interval: str
    label: str


class ClaimRow(NamedTuple):
    """A claim in one training. trainings: how many rows the claim has, in the first of them, else
    0; anchor: where its details are; answer: the verdict; shown, folded: the cells of its contrasts
    by CONTRASTS."""

    sentence: str
    trainings: int
    training: str
    anchor: str
    answer: str
    lines: list[EffectLine]
    runs: str
    p_holm: str
    words: str
    shown: list[list[str]]
    folded: list[list[str]]


CONTRASTS: tuple[Column[Effect], ...] = (
    Column("contrast", lambda effect: effect.label),
    Column("role", lambda effect: effect.role),
    Column("effect", effect_text),
    Column("95 % interval", interval_text),
    Column("runs", lambda effect: str(effect.runs)),
    Column("p", lambda effect: _with(effect.p, effect.test)),
    Column("p, sign flips", lambda effect: _with(effect.p_flips, _least(effect))),
    Column("p, equivalence", lambda effect: _with(effect.p_equivalent, effect.smallest_text)),
)


def claim_rows(verdicts: Sequence[Verdict]) -> list[ClaimRow]:
    """The verdicts, those of one claim one after another."""
    rows = []
    for claim in dict.fromkeys(verdict.claim for verdict in verdicts):
        of_claim = [verdict for verdict in verdicts if verdict.claim == claim]
        counts = [len(of_claim)] + [0] * (len(of_claim) - 1)
        rows += [_row(each, count) for each, count in zip(of_claim, counts, strict=True)]
    return rows


def _with(p: float, note: str) -> str:
    if isnan(p):
        return DASH
    return f"{p_cell(p)} ({note.replace(' ', NO_BREAK) if len(note) <= SHORT else note})"


def _least(effect: Effect) -> str:
    """How small it can be."""
    return f"≥ {p_cell(effect.least_p_flips)}"


def _row(verdict: Verdict, trainings: int) -> ClaimRow:
    primary = [effect for effect in verdict.effects if effect.role == "primary"]
    return ClaimRow(
        sentence=verdict.sentence,
        trainings=trainings,
        training=verdict.training,
        anchor=slug(f"{verdict.claim} {verdict.training}"),
        answer=verdict.verdict,
        lines=[EffectLine(effect_text(e), interval_text(e), e.label) for e in primary],
        runs=str(verdict.runs) if primary else DASH,
        p_holm=p_cell(primary[0].p_holm) if primary else DASH,
        words=verdict.words,
        shown=[cells(CONTRASTS, e) for e in verdict.effects if e.role in DECIDING],
        folded=[cells(CONTRASTS, e) for e in verdict.effects if e.role not in DECIDING],
    )
