"""The rules that verdicts follow, and the sentences that say so."""

from math import atanh, exp, expm1, isnan, log, nan

import numpy as np
import pytest

from ironmoe.bench.study.claims.judging.needed import runs_to_decide
from ironmoe.bench.study.claims.judging.reasons import Judged, reason_in_words
from ironmoe.bench.study.claims.judging.rules import PValues, corrected, p_values, reason
from ironmoe.bench.study.claims.parts import contrast as contrasts
from ironmoe.bench.study.claims.parts.claim import Findings
from ironmoe.bench.study.claims.parts.contrast import Contrast, effect
from ironmoe.bench.study.claims.parts.ladders import (
    choice_ladder,
    dense_arm,
    expert_ladder,
    reference_arm,
)
from ironmoe.bench.study.claims.parts.outcomes import is_accuracy, title
from ironmoe.bench.study.claims.parts.units import CORRELATION, POINTS, RATIO
from ironmoe.bench.study.claims.parts.verdict import BECAUSE
from ironmoe.bench.study.claims.parts.words import compared, interval, left_out, number, p_text
from ironmoe.bench.study.ladder.arms import LADDER
from ironmoe.bench.study.statistics.permutation import Permutation

ARMS = list(LADDER.values())


def around(mean, *, half=0.5, runs=4, unit=POINTS, setting="", permutation=None):
    """A contrast whose seeds lie evenly around its mean, its setting named where there are more."""
    steps = [half * (2 * seed / (runs - 1) - 1) for seed in range(runs)] if runs > 1 else [0.0]
    by_seed = {seed: mean + step for seed, step in enumerate(steps)}
    return contrasts.tested(Contrast("label", "primary", unit, by_seed, setting, permutation))


def findings(confounded="", blind=""):
    return Findings([], [], [], [], confounded, blind)


def judged(tests, direction=1, **kinds):
    p = corrected({"claim": p_values(tests, direction)})["claim"]
    return reason(tests, direction, p, findings(**kinds))


@pytest.mark.parametrize(
    ("mean", "half", "direction", "expected"),
    [
        (5.0, 0.5, 1, "effect"),
        (5.0, 0.5, -1, "opposite"),
        (-5.0, 0.5, -1, "effect"),
        (-5.0, 0.5, 1, "opposite"),
        (2.1, 0.5, 1, "may be small"),
        (1.0, 0.1, 1, "no difference"),
        (0.0, 0.5, 1, "no difference"),
        (-1.0, 0.1, 1, "opposite"),
        (1.0, 5.0, 1, "contains 0"),
        (0.0, 0.5, 0, "equivalence"),
        (-5.0, 0.5, 0, "change"),
        (5.0, 0.5, 0, "change"),
        (2.0, 0.5, 0, "neither"),
    ],
)
def test_one_contrast_follows_the_rules(mean, half, direction, expected):
    assert judged([around(mean, half=half)], direction) == expected


@pytest.mark.parametrize(("runs", "expected"), [(1, "few runs"), (2, "few runs"), (3, "effect")])
def test_fewer_than_three_runs_decide_nothing(runs, expected):
    found = [around(50.0, runs=runs)]
    assert judged(found) == expected and isnan(p_values(found, 1).so) == (runs < 3)


def test_all_of_several_contrasts_have_to_agree():
    assert judged([around(5.0), around(6.0)]) == "effect"
    assert judged([around(5.0), around(1.0, half=5.0)]) == "contains 0"
    assert judged([around(5.0), around(2.1)]) == "may be small"
    assert judged([around(5.0), around(0.0)]) == "no difference"
    assert judged([around(5.0), around(-5.0)]) == "opposite"
    assert judged([around(5.0), around(6.0)], confounded="why") == "confounded"
    assert judged([around(5.0)], blind="why") == judged([around(0.0)], blind="why") == "blind"
    assert judged([around(0.0), around(-5.0)], 0) == "change"
    assert judged([around(0.0), around(2.0)], 0) == "neither"


def test_that_all_are_so_is_as_sure_as_the_least_sure_of_them():
    sure, less_sure = around(9.0), around(5.0, half=2.0)
    assert sure.p < less_sure.p == p_values([sure, less_sure], 1).so
    assert p_values([sure, around(-9.0)], 1).so == 1


def test_that_one_of_two_is_otherwise_costs_a_correction():
    one, two = p_values([around(-1.0, half=0.4)], 1), p_values([around(-1.0, half=0.4)] * 2, 1)
    assert two.opposite == pytest.approx(2 * one.opposite) and one.so == two.so == 1


def test_holms_correction_can_take_a_verdict_away():
    found = [around(8.0, half=3.7, runs=4)]
    p = p_values(found, 1)
    assert 0.01 < p.so < 0.05 and reason(found, 1, p, findings()) == "effect"
    others = {name: PValues(0.9, 0.9, 0.9) for name in "abcd"}
    assert reason(found, 1, corrected({"claim": p} | others)["claim"], findings()) == "Holm"


def test_a_permutation_test_takes_the_place_of_the_t_test_where_it_can_reach_1_percent():
    assert around(5.0, permutation=Permutation(0.3, 0.001, True)).p == 0.3
    assert around(5.0, permutation=Permutation(0.3, 0.25, True)).test == "paired t"
    assert judged([around(5.0, permutation=Permutation(0.3, 0.001, True))]) == "Holm"


@pytest.mark.parametrize(
    ("mean", "direction"),
    [(0.0, 1), (0.7, 1), (1.2, 1), (3.0, 1), (6.0, 1), (-1.2, 1), (-3.0, -1), (0.8, 0), (3.2, 0)],
)
def test_so_many_runs_decide_in_four_studies_of_five(mean, direction):
    """Simulated by the rules themselves, with the effect and scatter that were seen."""
    seen = around(mean, half=3.0, runs=6)
    needed = runs_to_decide([seen], direction, 0.05)
    rng, decided = np.random.default_rng(0), []
    for _ in range(400):
        by_seed = dict(enumerate(rng.normal(mean, seen.paired.sd, needed)))
        found = contrasts.tested(Contrast("label", "primary", POINTS, by_seed))
        decided.append(BECAUSE[judged([found], direction)] != "undecided")
    assert np.mean(decided) > 0.72
    # one run more than there are is the least that is named, and of two rules either may decide
    if needed > 7 and mean != -1.2:
        assert np.mean(decided) < 0.88


def test_runs_that_would_decide_are_more_near_the_border_and_after_correction():
    wide = around(0.5, half=5.0)
    assert runs_to_decide([wide], 1, 0.01) > runs_to_decide([wide], 1, 0.05)
    assert runs_to_decide([around(1.5, half=5.0)], 1, 0.05) > runs_to_decide([wide], 1, 0.05)
    assert runs_to_decide([around(2.0, half=0.9, runs=8)], 1, 0.01) is None
    assert runs_to_decide([around(0.0, half=900.0)], 1, 0.01) is None
    assert runs_to_decide([around(1.0, runs=1)], 1, 0.01) is None
    both = [around(5.0, half=5.0), around(5.0, half=9.0)]  # all have to agree
    assert runs_to_decide(both, 1, 0.01) == runs_to_decide(both[1:], 1, 0.01)


def said(tests, direction=1, claims=1, needed=None, confounded=""):
    p = corrected({"claim": p_values(tests, direction)})["claim"]
    found = findings(confounded)
    because = reason(tests, direction, p, found)
    return " ".join(reason_in_words(Judged(direction, because, tests, p, claims, needed, found)))


def test_every_reason_is_a_sentence_with_its_numbers():
    eight = {"runs": 8}
    assert said([around(5.0, **eight)]) == (
        "The whole interval lies beyond 2 points, the smallest effect of interest (p < 0.001)."
    )
    assert said([around(-5.0, **eight)], claims=5) == (
        "The interval lies on the other side of 0: the opposite of the claim (p < 0.001 after "
        "Holm's correction for 5 claims)."
    )
    assert said([around(0.1, **eight)]) == (
        "There is no difference of more than 2 points (p < 0.001)."
    )
    assert said([around(2.1, **eight)]) == (
        "There is an effect (p < 0.001), but it may be less than 2 points, the smallest one of "
        "interest. 1,000 paired runs would not be sure to decide either."
    )
    assert said([around(1.0, half=9.0, **eight)], needed=50) == (
        "The interval contains 0. About 50 paired runs would decide in four studies of five, if "
        "effect and scatter are those of these runs."
    )
    assert said([around(0.0, **eight)], 0) == (
        "A change of 2 points or more is excluded (p < 0.001)."
    )
    assert said([around(-6.0, **eight)], 0) == (
        "That is a change of more than 2 points (p < 0.001)."
    )
    assert said([around(2.0, half=0.9, **eight)], 0, needed=9).startswith(
        "A change of 2 points is neither excluded (p = 0.5) nor shown (p = 1)."
    )
    assert said([around(5.0, **eight)], confounded="Because.") == "Because."


def test_of_several_contrasts_a_sentence_names_those_it_speaks_of():
    good, bad = around(5.0, runs=8, setting="A"), around(0.5, runs=8, half=5, setting="B")
    assert said([good, good]).startswith("Each whole interval lies beyond 2 points")
    assert said([good, bad], needed=9).startswith("The interval with B contains 0. About 9")
    assert said([bad, bad], needed=9).startswith("The intervals with B and B contain 0.")
    level = around(0.0, runs=8, setting="B")
    assert said([good, level]).startswith("There is no difference of more than 2 points with B (p")


def test_few_runs_say_what_they_cannot_show():
    assert said([around(5.0, half=0.2, runs=3)]).endswith(
        "With 3 paired runs a test by flipping signs cannot give less than p = 0.25, so this rests "
        "on t tests and t intervals, which take the differences to be normal."
    )
    assert "less than p = 0.0625, so" in said([around(5.0, half=0.2, runs=5)])
    by_arms = around(5.0, half=0.2, runs=4, permutation=Permutation(0.001, 0.001, exact=False))
    assert said([by_arms]).endswith(
        "so this rests on permutations of the arms of a seed, which take these to be "
        "exchangeable, and t intervals, which take the differences to be normal."
    )
    assert "flipping" not in said([around(5.0, runs=6)])
    assert "scatter are those of these runs" in said([around(1.0, half=9.0, runs=5)], needed=40)
    assert said([around(5.0, runs=1)]) == (
        "One paired run has no interval: another seed could give another sign. A verdict needs 3 "
        "at least."
    )
    assert said([around(5.0, runs=2)]).startswith("2 paired runs show that results vary")


def effect_between(low, high, unit=POINTS, runs=8):
    middle = (low + high) / 2
    return effect(around(middle, runs=runs, unit=unit).contrast)._replace(
        mean=middle, low=low, high=high
    )


def test_numbers_have_signs_digits_and_plurals():
    assert [number(value) for value in (-0.04, 0.04, -1.25, 12.0)] == ["0.0", "0.0", "−1.2", "12.0"]
    assert [number(value) for value in (623573.9, -2e6)] == [
        "more than 10,000",
        "less than −10,000",
    ]
    assert [p_text(p) for p in (0.0002, 0.00051, 0.0496, 0.0999, 0.123, 1.0)] == [
        "p < 0.001", "p < 0.001", "p = 0.050", "p = 0.1", "p = 0.123", "p = 1",
    ]  # fmt: skip
    assert (
        interval(effect_between(1.04, 5.16), POINTS)
        == "(95 % interval of the difference 1.0 to 5.2, 8 paired runs)"
    )
    assert interval(effect_between(-3.0, 22.0, RATIO), RATIO) == (
        "(95 % interval of the difference −3.0 to 22.0 %, 8 paired runs)"
    )
    assert interval(effect_between(nan, nan, runs=1), POINTS) == "(1 paired run, no interval)"
    words = ("{} more", "{} less", "as much")
    assert compared(effect_between(1.0, 5.2), POINTS, *words) == "3.1 points more"
    assert compared(effect_between(-5.2, -1.0), POINTS, *words) == "3.1 points less"
    assert compared(effect_between(-1.0, 0.96), POINTS, *words) == "as much"
    assert compared(effect_between(-0.4, -0.2, CORRELATION), CORRELATION, *words) == "0.30 less"
    assert left_out([]) == [] and "Seed 3 is left out" in left_out([3])[0]
    assert "Seeds 1, 2 and 3 are" in left_out({3, 1, 2})[0]


def test_units_bring_numbers_to_a_scale_and_back():
    assert POINTS.scale(0.5) == 50 and POINTS.shown(-3.0) == -3
    assert RATIO.scale(2.0) - RATIO.scale(1.0) == pytest.approx(log(2))
    assert RATIO.shown(log(1.12)) == pytest.approx(12) and isnan(RATIO.scale(0.0))
    assert RATIO.shown(RATIO.smallest) == pytest.approx(5)
    assert CORRELATION.scale(0.5) == pytest.approx(atanh(0.5)) and CORRELATION.scale(1.0) < 10
    assert CORRELATION.shown(CORRELATION.smallest) == pytest.approx(0.1)


def test_an_effect_is_printed_in_its_unit_and_tested_on_its_scale():
    found = around(log(1.4), half=0.1, unit=RATIO)
    shown = contrasts.effect_of(found)
    ends = [100 * expm1(end) for end in (found.paired.low, found.paired.high)]
    assert (shown.mean, shown.low, shown.high) == pytest.approx((40, *ends))
    assert shown.by_seed[3] == pytest.approx(100 * (1.4 * exp(0.1) - 1))
    assert (shown.p, shown.p_flips, shown.least_p_flips) == (found.paired.p, 0.125, 0.125)


def test_ladders_hold_what_differs_in_one_thing():
    def names(found):
        return [arm.name for arm in found]

    assert dense_arm(ARMS).name == "dense" and dense_arm(ARMS[1:]) is None
    assert names(expert_ladder(ARMS, renormalize=False)) == ["E2", "E4", "E8", "E16", "E32"]
    renormalized = ["E2", "E4-renorm", "E8-renorm", "E16-renorm", "E32-renorm"]
    assert names(expert_ladder(ARMS, renormalize=True)) == renormalized
    assert reference_arm(ARMS, renormalize=True).name == "E8-renorm"
    assert names(choice_ladder(ARMS, renormalize=False, equal_width=False)) == [
        "E8-K1", "E8", "E8-K4",
    ]  # fmt: skip
    assert names(choice_ladder(ARMS, renormalize=True, equal_width=True)) == [
        "E8-K1-wide-renorm", "E8-renorm", "E8-K4-wide-renorm",
    ]  # fmt: skip
    wide = LADDER["E8"]._replace(name="wide", experts=16, equal_width=True)
    assert names(expert_ladder([LADDER["E8"], wide], renormalize=False)) == ["E8"]
    assert expert_ladder(ARMS[:1], renormalize=False) == []
    assert choice_ladder(ARMS[:1], renormalize=False, equal_width=True) == []


def test_accuracies_are_known_by_their_names():
    assert all(map(is_accuracy, ("clean", "pgd@8", "apgd-t@25.5", "vmoe@4")))
    others = ("auc", "routing@8:realised", "vmoe@8:changed", "frozen@8", "clean loss")
    assert not any(map(is_accuracy, others))
    assert title("vmoe@8") == "accuracy under PGD.vmoe at 8/255"
