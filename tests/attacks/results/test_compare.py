"""``compare``: two runs on the same images, counted by hand, and what is no such pair."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ironmoe.attacks import (
    FGSM,
    PGD,
    JournalError,
    RobustnessReport,
    accuracies,
    check_model,
    compare,
    csv_table,
    evaluate,
    latex_table,
    paired_difference,
    per_image,
)
from ironmoe.attacks.results.outcomes import Outcomes

SMALL, LARGE = 0.01, 0.05


def row(clean, fell_at=None, held_at=None, label=0, checksum=None, skipped=False):
    return {
        "clean_right": clean,
        "fell": fell_at is not None,
        "eps": fell_at,
        "held_at": held_at,
        "label": label,
        "checksum": checksum,
        "skipped": skipped,
        "passes": 1,
    }


def held(**options):
    return row(True, None, LARGE, **options)


def fell(at, **options):
    return row(True, at, None if at == SMALL else SMALL, **options)


def undecided(held_at=None, **options):
    return row(True, None, held_at, **options)


def run(complete=True, numbers=None, **attacks):
    """Of rows by attack."""
    rows = {
        name: dict(zip(numbers or range(len(of)), of, strict=True)) for name, of in attacks.items()
    }
    return Outcomes(rows, dict.fromkeys(attacks, (SMALL, LARGE)), complete)


def line(comparison, attack, eps):
    return next(one for one in comparison.lines if (one.attack, one.eps) == (attack, eps))


def test_each_line_counts_what_held_in_one_run_only():
    one = run(
        a=[held(), held(), fell(LARGE), row(False)], b=[held(), fell(SMALL), held(), row(False)]
    )
    other = run(a=[held(), fell(SMALL), fell(SMALL), held()], b=[held()] * 4)
    found = compare(one, other)
    assert [(each.attack, each.eps) for each in found.lines] == [
        ("clean", None), ("a", SMALL), ("a", LARGE), ("b", SMALL), ("b", LARGE),
        ("worst case", SMALL), ("worst case", LARGE),
    ]  # fmt: skip
    tables = [tuple(each.result.counts) for each in found.lines]
    assert tables == [
        (3, 0, 1, 0), (1, 2, 1, 0), (1, 1, 1, 1), (2, 0, 2, 0), (2, 0, 2, 0),
        (1, 1, 1, 1), (1, 0, 1, 2),
    ]  # fmt: skip
    assert line(found, "a", SMALL).result == paired_difference([1, 1, 1, 0], [1, 0, 0, 1])
    assert found.notes == [] and {each.undecided for each in found.lines} == {0}


def test_exchanged_runs_give_opposite_lines():
    one, other = (
        run(a=[held(), fell(SMALL), undecided()]),
        run(a=[undecided(SMALL), held(), held()]),
    )
    found, exchanged = compare(one, other), compare(other, one)
    for each, opposite in zip(found.lines, exchanged.lines, strict=True):
        assert opposite.result.difference == -each.result.difference
        assert opposite.result.p_value == each.result.p_value
        low, high = each.result.interval
        assert opposite.result.interval == pytest.approx((-high, -low))


def test_a_run_beside_itself_differs_by_nothing():
    one = run(a=[held(), fell(SMALL), row(False)])
    for each in compare(one, one).lines:
        assert (each.result.difference, each.result.p_value) == (0, 1)


def test_undecided_images_allow_for_either_end():
    """They are no fair sample, since images that fall are decided first: they count as right so
    far, and test and interval hold whatever becomes of them."""
    one = run(a=[held()] * 20 + [undecided()] * 2, complete=False)
    other = run(a=[fell(SMALL)] * 20 + [held()] * 2)
    found = line(compare(one, other), "a", LARGE)
    assert found.undecided == 2
    so_far, ends = (
        paired_difference([1] * 22, [0] * 20 + [1] * 2),
        [paired_difference([1] * 20 + [end] * 2, [0] * 20 + [1] * 2) for end in (0, 1)],
    )
    assert found.result.difference == so_far.difference
    assert found.result.p_value == max(end.p_value for end in ends) == ends[0].p_value < 1e-3
    assert found.result.interval == (ends[0].interval[0], ends[1].interval[1])


def test_undecided_images_that_may_turn_the_result_leave_no_evidence():
    one = run(a=[held()] * 9 + [undecided()] * 9, complete=False)
    other = run(a=[fell(SMALL)] * 9 + [held()] * 9)
    assert line(compare(one, other), "a", LARGE).result.p_value == 1


def test_a_stopped_run_is_no_evidence_against_its_model():
    """Images that fall are known first. Left out, the others would make a model look bad beside
    itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images = torch.rand(100, 1, 8, 8)
    data = (images, model(images).argmax(1))
    attacks = {"pgd": PGD(model, 0.02, steps=20)}
    whole = evaluate(model, data, attacks, checks=False)
    stopped = evaluate(model, data, attacks, checks=False, max_forwards=900)
    summary = stopped.attacks["pgd"]
    known = summary.decided
    assert int((~known).sum()) > 0 and summary.fell[known].double().mean() > 0.5
    assert line(compare(stopped, whole), "pgd", 0.02).result.p_value == 1


def test_images_that_a_budget_kept_a_run_from_are_left_out_and_said():
    one = run(a=[held(), fell(SMALL)], complete=False)
    other = run(a=[held(), held(), fell(SMALL)])
    found = compare(one, other)
    assert {each.result.images for each in found.lines} == {2}
    assert found.notes == ["Images left out, because one run did not come to them: 1."]


def test_images_that_one_run_skipped_are_left_out_and_said():
    one = run(a=[held(), fell(SMALL), held(skipped=True)])
    other = run(a=[held(), held(skipped=True), held()])
    found = compare(one, other)
    assert {each.result.images for each in found.lines} == {1}
    assert found.notes == ["Images left out, because one run skipped them: 2."]


def test_random_models_are_compared_by_how_often_they_are_right():
    """The first half of the passes chooses the attack, the second half counts."""

    def random(first, second):
        return held() | {"passes": 16, "right_first": first, "right_second": second}

    one = run(
        a=[random([8, 4, 4], [6, 5, 4]), random([8, 8, 2], [8, 7, 3])],
        b=[random([8, 3, 3], [6, 8, 8]), random([8, 8, 8], [8, 1, 1])],
    )
    other = run(a=[held(), fell(LARGE)], b=[held(), held()])
    found = compare(one, other)
    assert line(found, "clean", None).result == paired_difference([6 / 8, 1], [1, 1])
    assert line(found, "a", LARGE).result == paired_difference([4 / 8, 3 / 8], [1, 0])
    assert line(found, "worst case", SMALL).result == paired_difference([8 / 8, 7 / 8], [1, 1])
    assert line(found, "worst case", LARGE).result == paired_difference([8 / 8, 3 / 8], [1, 0])


def test_what_only_one_run_has_is_said():
    one = run(a=[held()], b=[held()])
    other = replace(run(a=[held()], c=[held()]), radii={"a": (LARGE, 0.1), "c": (LARGE,)})
    found = compare(one, other)
    assert [(each.attack, each.eps) for each in found.lines] == [("clean", None), ("a", LARGE)]
    assert found.notes == [
        "Only the first run has b.",
        "Only the first run has a at 0.01.",
        "Only the second run has c.",
        "Only the second run has a at 0.1.",
    ]


def test_a_worst_case_without_common_radii_is_at_the_largest_ones():
    one = replace(run(a=[held()], b=[fell(SMALL)]), radii={"a": (LARGE,), "b": (SMALL,)})
    found = compare(one, one)
    assert line(found, "worst case", None).result.accuracy_one == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run(a=[held()] * 3), r"the same images, got 2 and 3; one is complete without image 2"),
        (run(a=[held()]), r"the same images, got 2 and 1; other is complete without image 1"),
        (run(a=[held(), held()], numbers=[1, 2]), "complete without image"),
        (run(a=[held(), held(label=3)]), "got image 1 with label 0 and 3"),
        (run(a=[held(checksum=8), held()]), "got image 0 with checksum 7 and 8"),
    ],
)
def test_runs_on_other_images_are_refused(other, message):
    one = run(a=[held(checksum=7), held()])
    with pytest.raises(ValueError, match=message):
        compare(one, other)


def test_reports_of_other_images_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10

    def report(images, labels):
        return evaluate(model, (images, labels), {"fgsm": FGSM(model)}, checks=False)

    one = report(images, labels)
    assert compare(one, report(images.clone(), labels)).notes == []
    with pytest.raises(ValueError, match="image 0 with checksum"):
        compare(one, report(images.flip(3), labels))
    with pytest.raises(ValueError, match="image 0 with label 0 and 9"):
        compare(one, report(images, 9 - labels))
    with pytest.raises(ValueError, match="got 20 and 10"):
        compare(one, report(images[:10], labels[:10]))


def test_reports_of_other_further_inputs_are_refused(tmp_path):
    class Scaled(nn.Module):
        def forward(self, images, factor):
            return images.flatten(1)[:, :10] * factor

    model, images, labels = Scaled(), torch.rand(20, 1, 8, 8), torch.arange(20) % 10

    def report(factor, journal=None):
        data = (images, labels, {"factor": factor})
        return evaluate(model, data, {"fgsm": FGSM(model)}, checks=False, journal=journal)

    factor = torch.ones(20, 1)
    one = report(factor, tmp_path)
    assert compare(one, report(factor.clone())).notes == []
    other = torch.cat([torch.ones(6, 1), torch.full((14, 1), 2.0)])
    with pytest.raises(ValueError, match="image 6 with checksum"):
        compare(one, report(other))
    with pytest.raises(JournalError, match="another image or label 6"):
        report(other, tmp_path)


def test_runs_without_a_common_image_say_so():
    one = run(a=[held()], numbers=[0], complete=False)
    other = run(a=[held()], numbers=[1], complete=False)
    lines = str(compare(one, other)).splitlines()
    assert lines[0] == "clean: no image in both runs"


def test_it_prints_and_goes_into_json():
    one, other = run(a=[held()] * 8), run(a=[fell(LARGE)] * 8)
    found = compare(one, other, confidence=0.9)
    assert str(found).splitlines()[2] == (
        "a at 0.05: 100.0 % and 0.0 %, difference +100.0 [+48.8, +100.0], p 0.00781, 8 images"
    )
    assert "McNemar's exact test; intervals of differences: 90 %" in str(found)
    entry = found.as_dict()["lines"][2]
    assert entry["only_one"] == 8 and entry["p_value"] == 2 / 2**8


@pytest.mark.parametrize("write", [per_image, accuracies, csv_table, latex_table])
@pytest.mark.parametrize("wrong", ["runs/one", {"model": 3}, "a list of reports"])
def test_what_is_no_report_is_refused(write, wrong):
    reports = [RobustnessReport(torch.ones(2, dtype=torch.bool))]
    with pytest.raises(TypeError, match=r"reports must be what evaluate returned, or a dict model"):
        write(reports if wrong == "a list of reports" else wrong)
    with pytest.raises(TypeError, match=r"a report must be what evaluate returned, got str"):
        compare("runs/one", "runs/other")


def test_checks_look_at_an_attack_and_not_at_its_model():
    with pytest.raises(TypeError, match=r"attack must be an attack .* PGD\(model\), got Flatten"):
        check_model(nn.Flatten(), torch.rand(2, 1, 2, 2), torch.zeros(2).long())
