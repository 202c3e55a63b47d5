"""Studies that were made to have effects, and what is said of them."""

import json

import pytest
from made_up_study import accuracies, changes, image_radii, positive, together
from planted_studies import ALL, PAIR, REFERENCE, SAME, by_experts, ladder, radii, rng, verdict

from ironmoe.bench.study.claims.choice_of_experts import CHOICE_OF_EXPERTS
from ironmoe.bench.study.claims.different_experts import DIFFERENT_EXPERTS
from ironmoe.bench.study.claims.equal_cost import EQUAL_COST
from ironmoe.bench.study.claims.more_experts import MORE_EXPERTS
from ironmoe.bench.study.claims.parts.verdict import as_entry
from ironmoe.bench.study.claims.smoothness import SMOOTHNESS
from ironmoe.bench.study.claims.table import CLAIMS, verdicts
from ironmoe.bench.study.ladder.arms import LADDER
from ironmoe.bench.study.statistics.holm import holm


@pytest.mark.parametrize("seeds", [3, 8])
def test_a_v_moe_that_keeps_more_accuracy_supports_claim_1(seeds):
    found = verdict(EQUAL_COST, ladder(lambda arm: 50 + 8 * (not arm.is_dense), seeds), ALL)
    assert found.verdict == "supported" and found.runs == seeds and found.runs_needed is None
    assert "At equal cost the V-MoE with 8 experts keeps" in found.words
    assert "more accuracy under attack than the dense ViT" in found.words
    assert ("flipping signs cannot give less than p = 0.25" in found.words) == (seeds == 3)
    first, second = found.effects[:2]
    assert first.role == "primary" and 5 < first.mean < 11 and len(first.by_seed) == seeds
    assert first.label.endswith("E8 − dense") and first.low > 2
    assert second.role == "control" and second.label.endswith("E8-renorm − dense")


def test_a_v_moe_that_keeps_less_contradicts_claim_1():
    found = verdict(EQUAL_COST, ladder(lambda arm: 50 - 5 * (not arm.is_dense)), ALL)
    assert (found.verdict, found.because) == ("against", "opposite")
    assert "less accuracy under attack than" in found.words and "other side of 0" in found.words


def test_equal_models_leave_no_difference_of_2_points():
    runs = accuracies(PAIR, 8, rng(), residual=lambda arm: 0.3, images=5_000)
    found = verdict(EQUAL_COST, runs, PAIR)
    assert (found.verdict, found.because) == ("against", "no difference")
    assert "There is no difference of more than 2 points (p" in found.words


def test_what_scatters_too_much_is_undecided_and_says_how_many_runs_it_takes():
    found = verdict(EQUAL_COST, accuracies(PAIR, 6, rng(2)), PAIR)
    assert found.verdict == "undecided" and found.runs_needed > 6
    assert f"About {found.runs_needed} paired runs would decide" in found.words
    assert "as far as" not in found.words


def test_a_sure_effect_that_may_be_small_is_undecided():
    runs = accuracies(
        PAIR, 8, rng(), lambda arm: 50 + 2 * (not arm.is_dense), residual=lambda arm: 0.5,
        images=5_000,
    )  # fmt: skip
    found = verdict(EQUAL_COST, runs, PAIR)
    assert (found.verdict, found.because) == ("undecided", "may be small")
    assert found.effects[0].low > 0 and "may be less than 2 points" in found.words


def test_one_run_is_never_enough_whatever_the_difference():
    found = verdict(EQUAL_COST, ladder(lambda arm: 90.0 * (not arm.is_dense), seeds=1), ALL)
    assert found.verdict == "undecided" and found.runs == 1 and found.runs_needed is None
    assert "(1 paired run, no interval)" in found.words and "another sign" in found.words
    found = verdict(EQUAL_COST, ladder(lambda arm: 90.0 * (not arm.is_dense), seeds=2), ALL)
    assert found.because == "few runs" and "A verdict needs 3 at least" in found.words


def test_a_rise_with_both_kinds_of_gates_supports_claim_2():
    found = verdict(MORE_EXPERTS, ladder(by_experts(5, 5)), ALL)
    assert found.verdict == "supported" and "it may come from the scale" not in found.words
    assert "From 2 to 32 experts at equal cost, with gates that sum to 1" in found.words
    source, renormalized = found.effects[:2]
    assert source.mean == pytest.approx(5, abs=1.5) and source.test == "permutation"
    assert renormalized.mean == pytest.approx(5, abs=1.5)
    assert "E = 2, 4, 8, 16, 32" in source.label and "E = 2, 4, 8, 16, 32" in renormalized.label


def test_a_rise_with_the_gates_of_the_source_alone_may_be_their_scale():
    """With little scatter the other ladder even shows that it is."""
    sums = [
        run._replace(values=run.values | {"gate_sum": 2 / max(2, LADDER[run.arm].experts)})
        for run in ladder(by_experts(8, 0), seeds=5, residual=2.5)
    ]
    found = verdict(MORE_EXPERTS, sums, ALL)
    assert (found.verdict, found.because) == ("undecided", "contains 0")
    assert "Only the gates of the source show a rise" in found.words
    assert "which sum to 1.00 with 2 experts and to 0.06 with 32" in found.words
    assert "The interval with gates that sum to 1 contains 0" in found.words

    level = accuracies(ALL, 8, rng(), by_experts(8, 0), residual=lambda arm: 0.5, images=5_000)
    found = verdict(MORE_EXPERTS, level, ALL)
    assert (found.verdict, found.because) == ("against", "no difference")
    assert "no difference of more than 2 points with gates that sum to 1" in found.words
    assert "Only the gates of the source show a rise" in found.words


def test_without_the_other_kind_of_gates_a_rise_supports_nothing():
    of = [arm for arm in ALL if not arm.renormalize]
    found = verdict(MORE_EXPERTS, ladder(by_experts(8, 0), of=of), of)
    assert (found.verdict, found.because) == ("undecided", "confounded")
    assert "may be the scale of the gates" in found.words and found.runs_needed is None
    (missing,) = found.missing
    assert "gates that sum to 1" in missing and missing in found.words


def test_a_fall_contradicts_claim_2():
    found = verdict(MORE_EXPERTS, ladder(by_experts(-8, -8)), ALL)
    assert (found.verdict, found.because) == ("against", "opposite")
    assert "falls by" in found.words
    assert "intervals with the gates of the source and gates that sum to 1 lie" in found.words


def test_k_stands_beside_and_decides_nothing():
    """K = 4 is far better, E makes no difference."""
    found = verdict(MORE_EXPERTS, ladder(lambda arm: 50 + 10 * (arm.top_k == 4)), ALL)
    assert found.verdict != "supported"
    rows = [effect for effect in found.effects if effect.role == "exploratory"]
    assert len(rows) == 4 and all("K = 1, 2, 4" in row.label and row.low > 2 for row in rows)


def test_larger_first_order_radii_support_claim_3():
    found = verdict(SMOOTHNESS, radii(lambda arm: 1 if arm.is_dense else 1.4), ALL)
    assert found.verdict == "supported" and found.effects[0].unit == "%"
    assert found.effects[0].mean == pytest.approx(40, abs=6)
    assert "% larger than that of the dense ViT" in found.words
    assert "0 for wrong images" in found.words and "beyond them" not in found.words


def test_smaller_jacobians_of_smaller_logits_are_not_smoother():
    """Logits a hundred times as small, radii alike."""
    scaled = positive(ALL, 8, rng(1), lambda arm: 1 if arm.is_dense else 0.01, name="jacobian")
    runs = together(radii(lambda arm: 1.0, residual=0.01), scaled)
    found = verdict(SMOOTHNESS, runs, ALL)
    assert (found.verdict, found.because) == ("against", "no difference")
    beside = found.effects[-1]
    assert "‖J‖" in beside.label and beside.role == "exploratory" and beside.mean < -95


def test_what_lies_beyond_the_tangent_stands_beside_and_decides_nothing():
    """By its tangents the V-MoE is smoother, and everything else says the opposite."""
    runs = together(
        radii(lambda arm: 1 if arm.is_dense else 1.4),
        *(
            positive(ALL, 8, rng(1), lambda arm: 1 if arm.is_dense else 1.5, name=name)
            for name in ("slope@0.5:free", "slope@8:free", "slope@8:frozen", "gamma@8:free")
        ),
        positive(ALL, 8, rng(2), lambda arm: 1 if arm.is_dense else 0.7, name="least_eps"),
    )
    found = verdict(SMOOTHNESS, runs, ALL)
    assert found.verdict == "supported"
    _, _, said = found.words.partition("This is about tangents alone. Beyond them, ")
    assert "at which FAB finds another class is 3" in said and "% smaller" in said
    assert "the largest secant of the logits within 8/255 is 5" in said and "% larger" in said
    labels = [row.label for row in found.effects if row.role == "secondary"]
    assert [label for label in labels if "within" in label] == [
        "largest secant of the logits within 0.5/255: E8 − dense",
        "largest secant of the logits within 8/255: E8 − dense",
        "curvature γ of the loss within 8/255: E8 − dense",
    ]


def test_a_negative_radius_has_no_logarithm_and_is_left_out():
    runs = radii(lambda arm: 1.0)
    runs = [r._replace(values={"r1": -1.0}) if (r.arm, r.seed) == ("E8", 3) else r for r in runs]
    found = verdict(SMOOTHNESS, runs, ALL)
    assert found.runs == 7 and "Seed 3 is left out" in found.words


@pytest.mark.parametrize(
    ("slope", "answer", "because"),
    [
        (-1.0, "supported", "effect"),
        (1.0, "against", "opposite"),
        (0.0, "against", "no difference"),
    ],
)
def test_images_whose_top_experts_differ_are_judged_at_the_same_margin(slope, answer, because):
    runs = image_radii(REFERENCE, 8, rng(), slope, images=400)
    found = verdict(DIFFERENT_EXPERTS, runs, [REFERENCE])
    assert (found.verdict, found.because) == (answer, because)
    if slope == 0:
        plain = found.effects[1]
        assert plain.mean > 0.3 and "given" not in plain.label  # the margin explains it


def test_images_without_a_radius_and_lists_of_fewer_images_are_let_be():
    runs = image_radii(REFERENCE, 4, rng(), -1.0, images=60)
    for run in runs:
        run.images["least_eps"][5] = float("nan")
        run.images["least_eps"][6] = float("inf")
        run.images["margin"] += [0.0] * 40
    assert verdict(DIFFERENT_EXPERTS, runs, [REFERENCE]).runs == 4
    runs[0].images["margin"][:] = [float("nan")] * 100
    found = verdict(DIFFERENT_EXPERTS, runs, [REFERENCE])
    assert found.runs == 3 and "Seed 0 is left out" in found.words


def test_between_models_the_distance_is_set_beside_robustness_within_seeds():
    runs = together(
        image_radii(REFERENCE, 8, rng(), 0.0),
        accuracies(ALL, 8, rng(), lambda arm: 50 - arm.experts, residual=lambda arm: 1),
        positive(ALL, 8, rng(1), lambda arm: 1 + arm.experts, name="top_distance"),
        accuracies(ALL, 8, rng(2), lambda arm: 95, shared=1, residual=lambda arm: 1, name="clean"),
    )
    found = verdict(DIFFERENT_EXPERTS, runs, ALL)
    (between,) = [effect for effect in found.effects if effect.role == "exploratory"]
    assert between.mean < -0.8 and between.p < 0.01 and between.runs == 8 * len(ALL)


def test_experts_that_may_be_exchanged_support_claim_5():
    found = verdict(CHOICE_OF_EXPERTS, changes(REFERENCE, 8, rng(), SAME), [REFERENCE])
    assert (found.verdict, found.because) == ("supported", "equivalence")
    assert "A change of 2 points or more is excluded" in found.words


def test_experts_that_are_far_apart_contradict_claim_5():
    far = SAME | {"random, same sum": -12.0, "lowest": -30.0}
    found = verdict(CHOICE_OF_EXPERTS, changes(REFERENCE, 3, rng(), far), [REFERENCE])
    assert (found.verdict, found.because) == ("against", "change")
    assert "more than 2 points with random experts" in found.words
    assert "With random experts at the same sum of gates, the V-MoE with 8 experts loses" in (
        found.words
    )
    lowest = found.effects[-1]
    assert lowest.role == "secondary" and "lowest − own choice" in lowest.label


def test_interventions_on_adversarial_images_stand_beside():
    runs = changes(REFERENCE, 8, rng(), SAME)
    for run in runs:
        run.values.update({"none:attacked": 0.2, "random, same sum:attacked": 0.5})
        run.values.update({"random, same sum:attacked:kl": 0.3, "none:clean:changed": 0.0})
    found = verdict(CHOICE_OF_EXPERTS, runs, [REFERENCE])
    (row,) = found.effects[2:]
    assert found.verdict == "supported" and row.mean == pytest.approx(30)
    assert row.label == "accuracy on adversarial images, random, same sum − own choice: E8"


def whole_study():
    return together(
        ladder(by_experts(8, 8)),
        radii(lambda arm: 1 if arm.is_dense else 1.4),
        image_radii(REFERENCE, 8, rng(), -1.0),
        changes(REFERENCE, 8, rng(), SAME),
    )


def test_a_whole_study_has_a_verdict_on_every_claim_for_each_training():
    runs = whole_study()
    adversarial = [run._replace(training="pgd-at") for run in runs if run.seed < 1]
    found = verdicts([*runs, *adversarial], ALL)
    assert [(each.training, each.claim) for each in found] == [
        (training, claim.key) for training in ("standard", "pgd-at") for claim in CLAIMS
    ]
    assert all("Holm's correction for 5 claims" in each.words for each in found[:3])
    assert all(each.because == "few runs" for each in found[5:])
    assert found[:5] == verdicts(runs[::-1], ALL)

    alone = {claim.key: verdict(claim, runs, ALL).effects[0].p_holm for claim in CLAIMS}
    corrected = {each.claim: each.effects[0].p_holm for each in found[:5]}
    last = (
        CHOICE_OF_EXPERTS.key
    )  # it claims that nothing changes, and is corrected with what says so
    assert corrected == holm(alone | {last: 1.0}) | {last: pytest.approx(5 * alone[last])}
    entries = json.loads(json.dumps([as_entry(each) for each in found], allow_nan=False))
    assert entries[5]["effects"][0]["low"] is None and entries[0]["verdict"] == found[0].verdict
