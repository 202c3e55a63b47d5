"""Claim 4: robustness suffers where the top experts of an input compute different things."""

from math import isnan, nan

import numpy as np
from numpy.typing import NDArray

from ironmoe.bench.study.claims.parts.blind import blind
from ironmoe.bench.study.claims.parts.claim import Claim, Findings
from ironmoe.bench.study.claims.parts.contrast import PERMUTATION, Contrast, effect
from ironmoe.bench.study.claims.parts.evidence import Evidence
from ironmoe.bench.study.claims.parts.ladders import deciding_arm, described, twin_arm
from ironmoe.bench.study.claims.parts.outcomes import AREA, CLEAN, LEAST_EPS, MARGIN, TOP_DISTANCE
from ironmoe.bench.study.claims.parts.units import CORRELATION, POINTS, RATIO
from ironmoe.bench.study.claims.parts.verdict import Effect, Role
from ironmoe.bench.study.claims.parts.words import compared, interval, left_out
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.statistics.correlation import rank_correlation, runs_correlation

FEWEST_IMAGES = 20
"""Of which all numbers are known; a rank correlation of fewer is hardly a number of the model."""

JUMP = "jump"
ASKED = {TOP_DISTANCE: "the distance of the top experts", JUMP: "the jump at the nearest swap"}
FEWEST_MODELS = 4
DRAWS = 1_999  # of permutations between models, which decide nothing


def _look(evidence: Evidence) -> Findings:
    """Within each model of the reference arm, one correlation over its images; then over runs. The
    clean margin is a covariate, because easy images differ from hard ones in both."""
    arm = deciding_arm(evidence.arms, at_any_cost=True)
    if arm is None:
        return Findings([], [], [], ["an arm with experts"])

    primary = _within(evidence, arm, "primary", given=MARGIN)
    if primary is None:
        return Findings([], [], [], _lacking(evidence, arm))

    twin = twin_arm(evidence.arms, arm)
    control = None if twin is None else _within(evidence, twin, "control", given=MARGIN)
    plain = _within(evidence, arm, "secondary", given=None)
    jump = _within(evidence, arm, "secondary", given=MARGIN, key=JUMP)
    beside = [effect(each) for each in (control, plain, jump) if each is not None]

    sentences = [_sentence(effect(primary), arm)]
    sentences += left_out(evidence.seeds([arm]) - primary.by_seed.keys())
    others = beside + _between(evidence)
    return Findings([primary], others, sentences, [], blind=blind(evidence, [arm]))


def _within(
    evidence: Evidence, arm: Arm, role: Role, *, given: str | None, key: str = TOP_DISTANCE
) -> Contrast | None:
    """One correlation a model, over the images of which all numbers are known. key: of ASKED."""
    keys = [LEAST_EPS, key, *([] if given is None else [given])]
    numbers = [evidence.images(arm, key) for key in keys]
    seeds = sorted(set.intersection(*map(set, numbers)))
    rho = {seed: _correlation([each[seed] for each in numbers]) for seed in seeds}
    by_seed = {seed: CORRELATION.scale(value) for seed, value in rho.items() if not isnan(value)}
    if not by_seed:
        return None

    label = f"Spearman's ρ over images of their least radius and {ASKED[key]}"
    label += ", given their clean margin" * (given is not None)
    return Contrast(f"{label}: {arm.name}", role, CORRELATION, by_seed)


def _correlation(columns: list[list[float]]) -> float:
    images = min(map(len, columns))  # some numbers are of fewer images, always of the first ones
    table: NDArray[np.float64] = np.array([column[:images] for column in columns], np.float64)
    known = table[:, ~np.isnan(table).any(0)]
    if known.shape[1] < FEWEST_IMAGES:
        return nan
    return rank_correlation(known[0], known[1], given=known[2] if len(known) > 2 else None)


def _lacking(evidence: Evidence, arm: Arm) -> list[str]:
    keys = [LEAST_EPS, TOP_DISTANCE, MARGIN]
    absent = [key for key in keys if not evidence.images(arm, key)]
    if absent:
        return list(dict.fromkeys(evidence.lacking(arm, key) for key in absent))
    most = max(len(row) for row in evidence.images(arm, LEAST_EPS).values())
    return [
        f"a correlation over images: it takes {FEWEST_IMAGES} that the model gets right, of which "
        f"these numbers differ, and no run of {arm.name} has so many among {most}"
    ]


def _between(evidence: Evidence) -> list[Effect]:
    """Models instead of images, arms of a seed in place of each other. They differ in more than
    this distance, so it decides nothing."""
    distance: list[float] = []
    area: list[float] = []
    clean: list[float] = []
    seeds: list[int] = []
    for arm in evidence.arms:
        columns = [
            evidence.by_seed(arm, key, unit)
            for key, unit in ((TOP_DISTANCE, RATIO), (AREA, POINTS), (CLEAN, POINTS))
        ]
        for seed in sorted(set.intersection(*map(set, columns))):
            for column, numbers in zip((distance, area, clean), columns, strict=True):
                column.append(numbers[seed])
            seeds.append(seed)

    if len(seeds) < FEWEST_MODELS:
        return []
    found = runs_correlation(distance, area, given=clean, blocks=seeds, draws=DRAWS)
    if isnan(found.rho):
        return []
    return [
        Effect(
            label="Spearman's ρ over models of their accuracy under attack and that distance, "
            "given their clean accuracy, within seeds",
            role="exploratory",
            unit=CORRELATION.name,
            smallest_text=CORRELATION.smallest_text,
            mean=found.rho,
            low=nan,
            high=nan,
            runs=len(seeds),
            by_seed={},
            p=found.permutation.p,
            test=PERMUTATION,
        )
    ]


def _sentence(found: Effect, arm: Arm) -> str:
    radius = compared(
        found,
        CORRELATION,
        "a larger least radius (ρ = {})",
        "a smaller least radius (ρ = −{})",
        "neither a larger nor a smaller least radius (ρ = 0.00)",
    )
    return (
        f"Within {described(arm)}, of two images with the same clean margin the one whose top "
        f"experts differ more has {radius} on average {interval(found, CORRELATION)}."
    )


DIFFERENT_EXPERTS = Claim(
    key="different experts",
    sentence="Robustness suffers where the top experts of an image compute different things.",
    direction=-1,
    look=_look,
)
