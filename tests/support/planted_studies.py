"""Studies whose arms were made to differ, and the verdict on one claim."""

from math import log2

import numpy as np
from made_up_study import accuracies, arms, positive

from ironmoe.bench.study.claims.parts.verdict import BECAUSE
from ironmoe.bench.study.claims.table import verdicts
from ironmoe.bench.study.ladder.arms import LADDER

ALL = list(LADDER.values())
PAIR, REFERENCE = arms("dense", "E8"), arms("E8")[0]
SAME = {"drop best, same sum": 0.0, "random, same sum": 0.0}


def rng(seed=0):
    return np.random.default_rng(seed)


def verdict(claim, runs, of):
    (found,) = verdicts(runs, of, claims=(claim,))
    assert BECAUSE[found.because] == found.verdict
    return found


def ladder(points, seeds=8, residual=1.0, of=ALL):
    return accuracies(of, seeds, rng(), points, residual=lambda arm: residual, images=5_000)


def by_experts(gain, renormalized_gain):
    """Points that accuracy gains from 2 to 32 experts with each kind of gates."""

    def points(arm):
        gains = renormalized_gain if arm.renormalize else gain
        return 50 + gains * log2(max(arm.experts, 2) / 2) / 4

    return points


def radii(factor, seeds=8, residual=0.03):
    return positive(ALL, seeds, rng(), factor, residual=residual)
