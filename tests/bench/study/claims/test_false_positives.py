"""How often verdicts are wrong where the truth is known.

Each bound is the count that binomial chance passes in one of 1,000 runs of the simulation at the
level that the verdict promises: 7.3 % of 1,000 studies for a level of 5 %. Where a verdict is wrong
exactly as often as its level says, it must not be much rarer either: models that scatter so much
that nothing is ever found keep any level. The simulations have fixed seeds.
"""

from collections import Counter
from functools import partial
from math import log2, nan

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
from ironmoe.bench.study.statistics.correlation import rank_correlation
from ironmoe.bench.study.statistics.permutation import Permutation
from ironmoe.bench.study.statistics.trend import trend

PAIR, REFERENCE = arms("dense", "E8"), arms("E8")[0]
LADDER = arms("E2", "E8", "E32", "E8-renorm", "E32-renorm")
DECIDED = ("effect", "opposite")
IMAGES = 50  # whose least radius a study measures
AT_MARGIN = -0.106
"""The slope of ``image_radii`` that makes the rank correlation given the margin −0.1."""


@pytest.fixture(autouse=True)
def _without_what_decides_nothing(monkeypatch):
    """It takes most of the time. A permutation test keeps its level with any number of draws."""
    study = "ironmoe.bench.study"
    untested = Permutation(nan, nan, exact=False)
    monkeypatch.setattr(f"{study}.statistics.paired.sign_flips", lambda differences: untested)
    monkeypatch.setattr(f"{study}.claims.judging.judge.runs_to_decide", lambda *_: None)
    monkeypatch.setattr(f"{study}.claims.parts.slopes.trend", partial(trend, draws=999))

    def at_equal_margin(x, y, *, given=None):
        return nan if given is None else rank_correlation(x, y, given=given)

    monkeypatch.setattr(f"{study}.claims.different_experts.rank_correlation", at_equal_margin)


def reasons(claim, of, make, studies=1_000):
    """How many of so many studies ended by each rule."""
    rng = np.random.default_rng(0)
    return Counter(verdicts(make(rng), of, claims=(claim,))[0].because for _ in range(studies))


def at_most(found, rules, level, *, exactly=False):
    """exactly: that often and no more, at the promised level."""
    wrong, studies = sum(found[rule] for rule in rules), sum(found.values())
    assert wrong <= binom.isf(1e-3, studies, level), found
    assert not exactly or wrong >= binom.ppf(1e-3, studies, level), found


@pytest.mark.parametrize("seeds", [3, 6, 8])
def test_equal_models_are_told_apart_in_5_percent_of_studies_at_most(seeds):
    """With the scatter that a pilot measured at 8/255: most of it is the seed's."""
    found = reasons(EQUAL_COST, PAIR, lambda rng: accuracies(PAIR, seeds, rng))
    at_most(found, DECIDED, 0.05)
    at_most(found, ["opposite"], 0.025, exactly=True)


@pytest.mark.parametrize("seeds", [3, 6, 8])
def test_a_difference_of_the_smallest_size_of_interest_is_neither_enlarged_nor_denied(seeds):
    """2 points: "supported" says that there are more, "no difference" that there are fewer."""

    def make(rng):
        return accuracies(
            PAIR, seeds, rng, lambda arm: 60 + 2 * (not arm.is_dense), images=50_000,
            residual=lambda arm: 0.4,
        )  # fmt: skip

    found = reasons(EQUAL_COST, PAIR, make)
    at_most(found, ["effect"], 0.025, exactly=True)
    at_most(found, ["no difference"], 0.05, exactly=True)
    at_most(found, ["opposite"], 0.005)


@pytest.mark.parametrize("seeds", [3, 6, 8])
def test_a_level_ladder_has_no_trend_whose_first_arm_scatters_most(seeds):
    """As in the pilot: with two experts runs scatter four times as much, and the permutation test
    alone takes all arms to scatter alike."""

    def make(rng):
        return accuracies(
            LADDER, seeds, rng, residual=lambda arm: 2 * RESIDUAL if arm.experts == 2 else 1.8
        )

    at_most(reasons(MORE_EXPERTS, LADDER, make), DECIDED, 0.05)


@pytest.mark.parametrize("seeds", [3, 8])
def test_a_ladder_that_rises_by_2_points_is_neither_enlarged_nor_denied(seeds):
    """With either kind of gates, so that each may be denied."""

    def make(rng):
        return accuracies(
            LADDER, seeds, rng, lambda arm: 60 + log2(arm.experts) / 2, images=50_000,
            residual=lambda arm: 0.4,
        )  # fmt: skip

    found = reasons(MORE_EXPERTS, LADDER, make)
    at_most(found, ["effect"], 0.025)
    at_most(found, ["no difference"], 0.05, exactly=True)
    at_most(found, ["opposite"], 0.005)


@pytest.mark.parametrize("seeds", [3, 8])
def test_equal_radii_are_told_apart_in_5_percent_of_studies_at_most(seeds):
    found = reasons(SMOOTHNESS, PAIR, lambda rng: positive(PAIR, seeds, rng))
    at_most(found, DECIDED, 0.05)
    at_most(found, ["opposite"], 0.025, exactly=True)
    at_most(found, ["effect"], 0.025)


@pytest.mark.parametrize("seeds", [3, 8])
def test_radii_5_percent_apart_are_neither_enlarged_nor_denied(seeds):
    def make(rng):
        factors = {"dense": 1.0, "E8": 1.05}
        return positive(PAIR, seeds, rng, lambda arm: factors[arm.name], residual=0.01)

    found = reasons(SMOOTHNESS, PAIR, make)
    at_most(found, ["effect"], 0.025, exactly=True)
    at_most(found, ["no difference"], 0.05, exactly=True)


@pytest.mark.parametrize(("seeds", "studies"), [(3, 1_000), (8, 1_000), (24, 700)])
def test_a_distance_that_only_follows_the_margin_is_not_blamed(seeds, studies):
    """Without the covariate all of these studies would find a correlation; what it leaves of one
    shows in many runs. Each run here has images of its own: what runs of a study share of an image
    beside its margin would add to this."""

    def make(rng):
        return image_radii(REFERENCE, seeds, rng, images=IMAGES)

    at_most(reasons(DIFFERENT_EXPERTS, [REFERENCE], make, studies), DECIDED, 0.05)


def test_at_the_margin_the_distance_has_a_rank_correlation_of_a_tenth():
    (run,) = image_radii(REFERENCE, 1, np.random.default_rng(0), AT_MARGIN, images=200_000)
    radius, distance, margin = (
        run.images[name] for name in ("least_eps", "top_distance", "margin")
    )
    found = rank_correlation(radius, distance, given=margin)
    assert found == pytest.approx(-0.1, abs=3 / 200_000**0.5)


@pytest.mark.parametrize(("seeds", "studies"), [(8, 1_000), (24, 500)])
def test_a_rank_correlation_of_a_tenth_is_neither_enlarged_nor_denied(seeds, studies):
    def make(rng):
        return image_radii(REFERENCE, seeds, rng, AT_MARGIN, images=IMAGES)

    found = reasons(DIFFERENT_EXPERTS, [REFERENCE], make, studies)
    at_most(found, ["effect"], 0.025)
    at_most(found, ["no difference"], 0.05, exactly=seeds == 24)  # fewer runs cannot be so sure


@pytest.mark.parametrize("seeds", [3, 8])
def test_a_change_of_2_points_is_neither_denied_nor_enlarged(seeds):
    """By one of two interventions: the other one changes nothing, so all hangs on the first."""
    points = {"drop best, same sum": -2.0, "random, same sum": 0.0}

    def make(rng):
        return changes(REFERENCE, seeds, rng, points, residual=0.5)

    found = reasons(CHOICE_OF_EXPERTS, [REFERENCE], make)
    at_most(found, ["equivalence"], 0.05, exactly=True)
    at_most(found, ["change"], 0.05)


def five_claims(make, studies=400):
    """By which rules the five verdicts of each study came."""
    of, rng = [*PAIR, *arms("E2", "E32", "E8-renorm", "E32-renorm")], np.random.default_rng(1)
    found = [[verdict.because for verdict in verdicts(make(of, rng), of)] for _ in range(studies)]
    assert len(CLAIMS) == 5 and all(len(each) == 5 for each in found)
    assert not any("not measured" in each for each in found)
    return found


def studies_with(found, rules):
    return Counter("wrong" if set(rules) & set(each) else "right" for each in found)


def test_five_claims_at_once_are_wrong_in_5_percent_of_studies_at_most():
    """Where nothing is there, "no difference" and "equivalence" are right."""
    none = {"drop best, same sum": 0.0, "random, same sum": 0.0}

    def make(of, rng):
        return together(
            accuracies(of, 6, rng),
            positive(of, 6, rng),
            image_radii(REFERENCE, 6, rng, images=IMAGES, residual=0.2),
            changes(REFERENCE, 6, rng, none),
        )

    found = five_claims(make)
    at_most(studies_with(found, [*DECIDED, "change"]), ["wrong"], 0.05)


def test_five_claims_at_once_deny_a_difference_in_5_percent_of_studies_at_most():
    """All five are of the smallest size of interest. The fifth claim is that there is none, so
    what supports it is corrected with what denies the others."""
    points = {0: 60.0, 2: 61.0, 8: 62.0, 32: 63.0}
    change = {"drop best, same sum": -2.0, "random, same sum": 0.0}

    def make(of, rng):
        return together(
            accuracies(
                of, 6, rng, lambda arm: points[arm.experts], images=50_000,
                residual=lambda arm: 0.4,
            ),
            positive(of, 6, rng, lambda arm: 1 + 0.05 * (not arm.is_dense), residual=0.01),
            image_radii(REFERENCE, 6, rng, AT_MARGIN, images=400),
            changes(REFERENCE, 6, rng, change, residual=0.5),
        )  # fmt: skip

    found = five_claims(make)
    at_most(studies_with(found, ["no difference", "equivalence"]), ["wrong"], 0.05)
