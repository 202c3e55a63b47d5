"""How often verdicts are wrong where the truth is known.

Each bound is the count that binomial chance passes in one of 1,000 runs of the simulation at the
level that the verdict promises; the simulation has a fixed seed.
"""

from collections import Counter
from math import log2

import numpy as np
import pytest
from made_up_study import RESIDUAL, accuracies, arms, changes, image_radii, positive, together
from scipy.stats import binom

from ironmoe.bench.study.claims.choice_of_experts import CHOICE_OF_EXPERTS
from ironmoe.bench.study.claims.different_experts import DIFFERENT_EXPERTS
from ironmoe.bench.study.claims.equal_cost import EQUAL_COST
from ironmoe.bench.study.claims.more_experts import MORE_EXPERTS
from ironmoe.bench.study.claims.smoothness import SMOOTHNESS
from ironmoe.bench.study.claims.table import CLAIMS, verdicts

PAIR, REFERENCE = arms("dense", "E8"), arms("E8")[0]
LADDER = arms("E2", "E8", "E32", "E8-renorm", "E32-renorm")
DECIDED = ("effect", "opposite")


def reasons(claim, of, studies, make):
    """How many of so many studies ended by each rule."""
    rng = np.random.default_rng(0)
    return Counter(verdicts(make(rng), of, claims=(claim,))[0].because for _ in range(studies))


def at_most(found, rules, level):
    wrong, studies = sum(found[rule] for rule in rules), sum(found.values())
    assert wrong <= binom.isf(1e-3, studies, level), found


@pytest.mark.parametrize("seeds", [3, 6, 8])
def test_equal_models_are_told_apart_in_5_percent_of_studies_at_most(seeds):
    """With the scatter that a pilot measured at 8/255: most of it is the seed's."""
    found = reasons(EQUAL_COST, PAIR, 200, lambda rng: accuracies(PAIR, seeds, rng))
    at_most(found, DECIDED, 0.05)


@pytest.mark.parametrize("seeds", [3, 6, 8])
def test_a_difference_of_the_smallest_size_of_interest_is_neither_enlarged_nor_denied(seeds):
    """2 points: "supported" says that there are more, "no difference" that there are fewer."""

    def make(rng):
        points = {"dense": 60.0, "E8": 62.0}
        return accuracies(PAIR, seeds, rng, lambda arm: points[arm.name], residual=lambda arm: 1)

    found = reasons(EQUAL_COST, PAIR, 200, make)
    at_most(found, ["effect"], 0.025)
    at_most(found, ["no difference"], 0.05)
    at_most(found, ["opposite"], 0.005)


@pytest.mark.parametrize("seeds", [3, 6, 8])
def test_a_level_ladder_has_no_trend_whose_first_arm_scatters_most(seeds):
    """As in the pilot: with two experts runs scatter four times as much, and the permutation test
    alone takes all arms to scatter alike."""

    def make(rng):
        return accuracies(
            LADDER, seeds, rng, residual=lambda arm: 2 * RESIDUAL if arm.experts == 2 else 1.8
        )

    at_most(reasons(MORE_EXPERTS, LADDER, 100, make), DECIDED, 0.05)


def test_a_ladder_that_rises_by_2_points_is_neither_enlarged_nor_denied():
    def make(rng):
        return accuracies(
            LADDER, 6, rng, lambda arm: 60 + log2(arm.experts) / 2, residual=lambda arm: 1
        )

    found = reasons(MORE_EXPERTS, LADDER, 100, make)
    at_most(found, ["effect"], 0.025)
    at_most(found, ["no difference"], 0.05)


@pytest.mark.parametrize("seeds", [3, 8])
def test_radii_5_percent_apart_are_neither_enlarged_nor_denied(seeds):
    def make(rng):
        factors = {"dense": 1.0, "E8": 1.05}
        return positive(PAIR, seeds, rng, lambda arm: factors[arm.name], residual=0.02)

    found = reasons(SMOOTHNESS, PAIR, 120, make)
    at_most(found, ["effect"], 0.025)
    at_most(found, ["no difference"], 0.05)


@pytest.mark.parametrize("seeds", [3, 8])
def test_a_distance_that_only_follows_the_margin_is_not_blamed(seeds):
    """Without the covariate all of these studies would find a correlation."""

    def make(rng):
        return image_radii(REFERENCE, seeds, rng, residual=0.2)

    at_most(reasons(DIFFERENT_EXPERTS, [REFERENCE], 60, make), DECIDED, 0.05)


@pytest.mark.parametrize("seeds", [3, 8])
def test_a_change_of_2_points_is_neither_denied_nor_enlarged(seeds):
    """By one of two interventions: the other one changes nothing, so all hangs on the first."""
    points = {"drop best, same sum": -2.0, "random, same sum": 0.0}

    def make(rng):
        return changes(REFERENCE, seeds, rng, points, residual=0.5)

    found = reasons(CHOICE_OF_EXPERTS, [REFERENCE], 150, make)
    at_most(found, ["equivalence"], 0.05)
    at_most(found, ["change"], 0.05)


def test_five_claims_at_once_are_wrong_in_5_percent_of_studies_at_most():
    """Where nothing is there, "no difference" and "equivalence" are right."""
    rng = np.random.default_rng(1)
    of = [*PAIR, *arms("E2", "E32", "E8-renorm", "E32-renorm")]
    none = {"drop best, same sum": 0.0, "random, same sum": 0.0}
    wrong, studies = 0, 40
    for _ in range(studies):
        runs = together(
            accuracies(of, 6, rng),
            positive(of, 6, rng),
            image_radii(REFERENCE, 6, rng, residual=0.2),
            changes(REFERENCE, 6, rng, none),
        )
        found = verdicts(runs, of)
        assert [verdict.verdict for verdict in found].count("not measured") == 0
        wrong += any(verdict.because in (*DECIDED, "change") for verdict in found)
    assert len(CLAIMS) == 5 and wrong <= binom.isf(1e-3, studies, 0.05)
