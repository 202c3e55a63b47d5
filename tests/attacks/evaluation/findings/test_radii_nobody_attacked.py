"""At a radius that no attack was run at, nothing is known: the error names the radii."""

import pytest
import toys
from torch import nn

from ironmoe.attacks import PGD, evaluate
from ironmoe.attacks.results.outcomes import outcomes_of

EPS = [4 / 255, 0.06]


@pytest.fixture(scope="module")
def data():
    return toys.blobs(30)


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(*data).float()


@pytest.fixture(scope="module", params=[1, 16])
def report(request, model, data):
    class Random(nn.Module):
        def forward(self, images):
            return model(images + 1e-3 * images.new_empty(images.shape).normal_())

    attacked = model if request.param == 1 else Random()
    attacks = {"first": PGD(attacked, steps=2), "second": PGD(attacked, steps=2, seed=1)}
    return evaluate(attacked, data, attacks, eps=EPS, checks=False, passes=request.param)


@pytest.mark.parametrize("eps", [0.0, 2 / 255, 0.03, 0.0600001, 16 / 255, float("nan")])
def test_an_accuracy_at_another_radius_is_an_error_that_names_the_radii(report, eps):
    said = r"^eps must be one of the radii that were attacked \(4/255, 0\.06\), got "
    outcomes = outcomes_of(report)
    asked = [report.worst_case_at, lambda eps: outcomes.under("first", eps, [0])]
    asked += [lambda eps: outcomes.under_all(["first", "second"], eps, [0])]
    for summary in report.attacks.values():
        asked += [summary.robust_accuracy_at, summary.robust_at, summary.undecided_at]
        asked += [summary.hits_at] if summary.passes > 1 else []
    for ask in asked:
        with pytest.raises(ValueError, match=said):
            ask(eps)


def test_every_radius_that_was_attacked_has_an_accuracy(report):
    for eps in EPS:
        assert report.worst_case_at(eps).total == 30
        for summary in report.attacks.values():
            assert summary.robust_accuracy_at(eps).value == summary.curve[eps].value
            assert len(summary.robust_at(eps)) == len(summary.undecided_at(eps)) == 30


def test_the_worst_case_is_known_at_the_radii_that_all_attacks_have(model, data):
    report = evaluate(model, data, {"a": PGD(model, steps=2)}, eps=EPS, checks=False)
    other = evaluate(model, data, {"b": PGD(model, steps=2)}, eps=EPS[:1], checks=False)
    report.attacks |= other.attacks
    with pytest.raises(ValueError, match=r"attacked \(4/255\), got 0\.06$"):
        report.worst_case_at(0.06)
    assert report.worst_case_at(4 / 255).total == 30
    report.attacks |= evaluate(
        model, data, {"b": PGD(model, steps=2)}, eps=[0.1], checks=False
    ).attacks
    with pytest.raises(ValueError, match=r"attacked \(none that all attacks have\), got 0\.06$"):
        report.worst_case_at(0.06)
