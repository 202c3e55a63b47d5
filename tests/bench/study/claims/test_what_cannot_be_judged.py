"""What is missing, or tells nothing: it is said, and no verdict rests on it."""

import pytest
from made_up_study import accuracies, changes, image_radii, together
from planted_studies import ALL, PAIR, REFERENCE, SAME, by_experts, ladder, radii, rng, verdict

from ironmoe.bench.study.claims.choice_of_experts import CHOICE_OF_EXPERTS
from ironmoe.bench.study.claims.equal_cost import EQUAL_COST
from ironmoe.bench.study.claims.more_experts import MORE_EXPERTS
from ironmoe.bench.study.claims.parts.ladders import twin_arm
from ironmoe.bench.study.claims.smoothness import SMOOTHNESS
from ironmoe.bench.study.claims.table import verdicts
from ironmoe.bench.study.ladder.arms import LADDER, Arm


def test_what_was_not_measured_is_named_and_not_judged():
    found = {each.claim: each for each in verdicts(ladder(by_experts(0, 0), of=PAIR), PAIR)}
    assert found["equal cost"].verdict != "not measured"
    expected = {
        "more experts": "a ladder of E with the gates of the source",
        "smoothness": "first-order radius r₁ of E8 (measurement “derivative”)",
        "different experts": "attack succeeds of E8 (measurement “least radius”)",
        "choice of experts": "accuracy with other experts of E8 (measurement “interventions”)",
    }
    for claim, missing in expected.items():
        assert found[claim].verdict == "not measured" and found[claim].effects == ()
        assert missing in found[claim].missing[0] and missing in found[claim].words
    (nothing,) = verdicts(ladder(by_experts(0, 0), of=PAIR[:1]), PAIR, claims=(EQUAL_COST,))
    assert nothing.missing == ("runs of E8",)
    (nothing,) = verdicts(ladder(by_experts(0, 0), of=PAIR[:1]), PAIR[:1], claims=(EQUAL_COST,))
    assert nothing.missing == ("an arm with experts",)


def test_a_radius_of_0_has_no_ratio_and_is_not_called_unmeasured():
    runs = [r._replace(values={"r1": 0.0}) if r.arm == "E8" else r for r in radii(lambda arm: 1.0)]
    found = verdict(SMOOTHNESS, runs, ALL)
    assert found.verdict == "not measured" and "it is 0 or not known" in found.words


def test_a_seed_without_a_partner_is_left_out_and_named():
    runs = [r for r in ladder(by_experts(8, 8)) if (r.arm, r.seed) not in {("E8", 2), ("dense", 5)}]
    found = verdict(EQUAL_COST, runs, ALL)
    assert found.runs == 6 and "Seeds 2 and 5 are left out" in found.words
    assert set(found.effects[0].by_seed) == {0, 1, 3, 4, 6, 7}


def test_models_of_other_ladders_are_compared_by_what_they_are():
    """K = 1, and no arm with 8 experts: the nearest one decides."""
    of = [Arm("vit"), Arm("switch-4", 4, 1), Arm("switch-64", 64, 1)]
    found = verdict(EQUAL_COST, accuracies(of, 3, rng()), of)
    assert found.effects[0].label.endswith("switch-4 − vit")
    assert "“switch-4” keeps" in found.words and "than “vit”" in found.words


def test_runs_that_cannot_be_told_apart_are_refused():
    runs = ladder(by_experts(0, 0), seeds=1, of=PAIR)
    with pytest.raises(ValueError, match="two of 'dense', seed 0"):
        verdicts([*runs, runs[0]], PAIR)
    with pytest.raises(ValueError, match=r"among \['dense'\], got 'E8'"):
        verdicts(runs, PAIR[:1])
    with pytest.raises(ValueError, match="a name each"):
        verdicts(runs, [*PAIR, PAIR[0]])


def test_of_arms_that_differ_in_name_alone_the_first_stands_for_both():
    double = REFERENCE._replace(name="again")
    runs = ladder(by_experts(8, 8), of=PAIR)
    more = [run._replace(arm="again") for run in runs if run.arm == "E8"]
    alone = verdict(EQUAL_COST, runs, PAIR)
    both = verdict(EQUAL_COST, [*runs, *more], [*PAIR, double])
    assert both.words == alone.words and both.effects[0] == alone.effects[0]
    assert "again − dense" in both.effects[1].label and both.effects[1].role == "secondary"


def test_the_twin_of_an_arm_has_its_experts_and_k():
    e2, e8, e4, renormalized = (LADDER[name] for name in ("E2", "E8", "E4", "E8-renorm"))
    assert twin_arm([e2, e8, e4], e8) is None  # E2 has both kinds of gates, and is another model
    assert twin_arm([e2, e8, renormalized], e8) == renormalized
    assert twin_arm([e4, renormalized], e4) is None
    assert twin_arm([e8, renormalized], renormalized) is None


def test_where_tokens_take_all_experts_no_other_choice_is_missed():
    arm = Arm("all", 4, 4)
    (found,) = verdicts(changes(arm, 8, rng(), SAME), [arm], claims=(CHOICE_OF_EXPERTS,))
    assert found.missing == ("another choice: every token of all takes all experts",)


@pytest.mark.parametrize("clean", ["clean", "none:clean"])
def test_models_that_guess_support_nothing(clean):
    """Nothing changes what they get right, and all of them are as good."""
    runs = together(
        ladder(by_experts(8, 8)),
        radii(lambda arm: 1 if arm.is_dense else 1.4),
        image_radii(REFERENCE, 8, rng(), -1.0),
        changes(REFERENCE, 8, rng(), SAME),
    )
    for run in runs:
        run.values.pop("none:clean", None)
        run.values[clean] = 0.11
    found = verdicts(runs, ALL, chance=0.1)
    guessing = {"equal cost", "more experts", "smoothness", "different experts"}
    guessing |= {"choice of experts"} if clean == "none:clean" else set()
    assert {each.claim for each in found if each.because == "blind"} == guessing
    assert all("hardly above chance" in each.words for each in found if each.because == "blind")
    assert not any(each.because == "blind" for each in verdicts(runs, ALL, chance=0.0))


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_where_all_or_no_images_are_lost_nothing_is_told(level):
    runs = [r._replace(values=r.values | {"auc": level}) for r in ladder(by_experts(0, 0))]
    found = verdict(EQUAL_COST, runs, ALL), verdict(MORE_EXPERTS, runs, ALL)
    assert {each.because for each in found} == {"blind"}
    assert all("other radii" in each.words for each in found)
