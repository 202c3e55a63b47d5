"""``print(report)``, its verdict, and ranges where a budget left images undecided."""

import json
import math

import pytest
import torch
import toys

from ironmoe.attacks import (
    PGD,
    AccuracyRange,
    ExpectedAccuracy,
    Proportion,
    UndecidedError,
    evaluate,
)
from ironmoe.attacks.evaluation.findings.accuracy import numbers_of, share
from ironmoe.attacks.evaluation.findings.verdict import verdict

EPS = [4 / 255, 0.06]


@pytest.fixture(scope="module")
def data():
    return toys.blobs(60)


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(*data).float()


def made(model, data, *, eps=EPS, **options):
    attacks = {"first": PGD(model, 0.06, steps=3), "second": PGD(model, 0.06, steps=3, seed=1)}
    return evaluate(model, data, attacks, eps=eps, **options)


@pytest.fixture(scope="module")
def whole(model, data):
    return made(model, data)


@pytest.fixture(scope="module")
def stopped(model, data):
    report = made(model, data, checks=False, max_forwards=700, batch_size=20)
    assert not report.complete
    return report


def test_a_range_has_two_ends_and_no_value():
    found = AccuracyRange(Proportion(30, 40), 10)
    assert (found.least, found.most, found.total) == (Proportion(20, 40), Proportion(30, 40), 40)
    assert found.interval() == (Proportion(20, 40).interval()[0], Proportion(30, 40).interval()[1])
    for name in ("value", "count"):
        with pytest.raises(UndecidedError, match=f"{name} must .* 10 of 40 images are undec"):
            getattr(found, name)
    assert str(found).startswith("50.0 to 75.0 % [") and str(found).endswith("10 undecided")
    known = Proportion(30, 40)
    assert known.least == known.most == known and known.undecided == 0
    random = ExpectedAccuracy(torch.tensor([4, 4, 0]), 4)
    assert AccuracyRange(random, 1).least.value == pytest.approx(1 / 3)
    assert share(AccuracyRange(random, 1)) == "33.3 to 66.7 %"


@pytest.mark.parametrize("accuracy", [Proportion(3, 4), AccuracyRange(Proportion(3, 4), 2)])
def test_numbers_for_json_have_the_same_keys_and_none_where_there_is_no_number(accuracy):
    numbers = numbers_of(accuracy)
    keys = {"count", "total", "value", "least", "most", "undecided", "wilson_95"}
    assert numbers.keys() == keys
    assert (numbers["value"] is None) == (numbers["count"] is None) == (accuracy.undecided > 0)
    assert numbers["least"] <= numbers["most"] == 0.75
    assert numbers["wilson_95"] == list(accuracy.interval())


def test_the_ends_of_a_range_are_what_falls_and_holds_if_the_run_goes_on(stopped, whole):
    ranges = 0
    for name, summary in stopped.attacks.items():
        for eps, found in summary.curve.items():
            same = torch.isin(whole.attacks[name].examples, summary.examples)
            truth = int(whole.attacks[name].robust_at(eps)[same].sum())
            assert found.least.count <= truth <= found.most.count
            ranges += found.undecided > 0
    assert ranges
    for eps in EPS:
        worst = stopped.worst_case_at(eps)
        of_one = [summary.robust_accuracy_at(eps) for summary in stopped.attacks.values()]
        assert worst.most.count <= min(each.most.count for each in of_one)
        assert worst.least.count <= min(each.least.count for each in of_one)


def test_a_finished_curve_has_plain_numbers(whole):
    for summary in whole.attacks.values():
        assert all(isinstance(each, Proportion) for each in summary.curve.values())
    assert whole.worst_case.value == whole.worst_case_at(EPS[1]).value


def test_json_of_an_unfinished_run_has_no_number_that_hides_undecided_images(stopped):
    numbers = json.loads(json.dumps(stopped.as_dict(), allow_nan=False))
    curves = [at for attack in numbers["attacks"].values() for at in attack["curve"]]
    open_ = [at for at in [*curves, numbers["worst_case"]] if at["undecided"]]
    assert open_ and all(at["value"] is None and at["least"] < at["most"] for at in open_)
    assert "undecided" in numbers["verdict"] and numbers["complete"] is False


def test_a_printed_report_is_a_table(whole):
    lines = str(whole).splitlines()
    assert lines[0].split() == ["attack", "eps", "accuracy", "95", "%", "interval", "undecided"]
    names = [line[:11].strip() for line in lines[1:8]]
    assert names == ["clean", "first", "first", "second", "second", "worst case", "worst case"]
    for line, found in zip(lines[6:8], map(whole.worst_case_at, EPS), strict=True):
        low, high = found.interval()
        assert f"{share(found)}  [{100 * low:.1f}, {100 * high:.1f}]" in line.replace("   ", "  ")
    assert [line[12:20].strip() for line in lines[6:8]] == ["4/255", "0.06"]
    assert len({len(line) for line in lines[:8]}) == 1 and max(map(len, lines[:8])) < 80
    assert lines[8] == whole.verdict
    unseen = [flag for flag in whole.checks if not flag.looked_at]
    assert unseen and all(f"- {flag.name}: {flag.message}" in lines for flag in unseen)
    assert "tensor" not in str(whole)


def test_a_printed_report_of_an_unfinished_run_shows_ranges(stopped):
    text = str(stopped)
    assert " to " in text and "a budget ended this early" in text
    assert "checks against false security were not made" in text


def test_its_repr_stays_short(whole, stopped):
    for report in (whole, stopped):
        assert "\n" not in repr(report) and repr(report).startswith("RobustnessReport(")
    assert "complete" in repr(whole) and "incomplete" in repr(stopped)
    assert "\n" not in repr(whole.attacks["first"])


def test_a_run_in_which_nothing_could_move_is_not_called_robust(model, data):
    for options in ({"steps": 0}, {"steps": 2, "alpha": 0.0}, {"steps": 2, "eps": 0.0}):
        attack = PGD(model, **{"eps": 0.06} | options)
        report = evaluate(model, data, {"pgd": attack})
        assert report.verdict.startswith("Nothing is known of robustness: pgd attacked no image")
        tripped = {flag.name for flag in report.checks if flag.tripped}
        assert tripped & {"radius too small", "attack takes no step"}
    wrong = (model(data[0]).argmax(1) + 1) % 4
    report = evaluate(model, (data[0], wrong), {"pgd": PGD(model, 0.06, steps=2)}, checks=False)
    assert "Nothing is known" in report.verdict and "wrong about all" in report.verdict


def test_an_attack_that_could_not_move_beside_one_that_could_is_named(model, data):
    attacks = {"real": PGD(model, 0.06, steps=3), "none": PGD(model, 0.06, steps=0)}
    report = evaluate(model, data, attacks)
    assert "none could find nothing" in report.verdict


def test_nothing_found_is_not_the_same_as_robust(model, data):
    report = evaluate(model, data, {"pgd": PGD(model, 1e-6, steps=1)}, checks=False)
    assert "cannot tell from attacks that are too weak" in report.verdict


def test_a_verdict_has_every_radius_and_further_doubts(whole):
    for eps in EPS:
        assert share(whole.worst_case_at(eps)) in whole.verdict
    assert "at 4/255 and " in whole.verdict and "under first and second in Linf;" in whole.verdict
    assert whole.verdict.count(".\n") == 0 and whole.verdict.endswith(".")
    doubted = verdict(whole, radius=lambda eps: f"<{255 * eps:.0f}>", doubts=["it is at chance"])
    assert "at <4> and" in doubted and "; it is at chance" in doubted


def test_a_verdict_names_each_norm_where_there_are_several(model, data):
    attacks = {"first": PGD(model, steps=1), "second": PGD(model, norm="L2", steps=1)}
    report = evaluate(model, data, attacks, eps=[0.06], checks=False)
    assert "under first in Linf and second in L2;" in report.verdict


def test_a_targeted_or_empty_report_still_prints(model, data):
    report = evaluate(model, data, {"pgd": PGD(model, 0.06, steps=1)}, max_forwards=1, checks=False)
    assert "Nothing is known of robustness" in report.verdict and str(report)
    assert math.isnan(Proportion(0, 0).value) and share(Proportion(0, 0)) == "–"
