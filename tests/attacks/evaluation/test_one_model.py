"""Attacks of one evaluation see one model: what would give each another is refused."""

import pytest
import torch
from torch import nn

from ironmoe.attacks import FGSM, PGD, Goal, HopSkipJump, Targeted, Untargeted, evaluate

MEAN = ([0.5], [0.25])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


@pytest.fixture
def data(model):
    x = torch.rand(12, 1, 4, 4)
    return x, model(x).argmax(1)


def negated(logits):
    return -logits


DIFFERENT = {
    "normalize": {"normalize": MEAN},
    "logits_fn": {"logits_fn": negated},
    "bounds": {"bounds": (-1.0, 1.0)},
    "targeted": {"targeted": True},
    "goal": {"goal": Targeted()},
}


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("first", [True, False])
def test_what_gives_another_model_or_another_clean_accuracy_is_refused(model, data, name, first):
    attacks = [("plain", PGD(model)), ("other", FGSM(model, **DIFFERENT[name]))]
    what = "goal" if name == "targeted" else name
    with pytest.raises(ValueError, match=f"attacks must have the same {what}, "):
        evaluate(model, data, dict(attacks if first else attacks[::-1]))


@pytest.mark.parametrize(
    "shared",
    [
        {"normalize": MEAN},
        {"normalize": (torch.tensor([0.5]), torch.tensor([0.25]))},
        {"logits_fn": negated},
        {"goal": Untargeted()},
        {"targeted": True},
    ],
)
def test_what_all_attacks_share_is_taken(model, data, shared):
    report = evaluate(model, data, {"p": PGD(model, **shared), "f": FGSM(model, **shared)})
    assert report.complete


def test_what_differs_in_the_search_alone_is_taken(model, data):
    attacks = {
        "plain": PGD(model),
        "bfloat16": PGD(model, attack_dtype=torch.bfloat16),
        "margin": PGD(model, loss="margin"),
        "equal": PGD(model, goal=Untargeted()),
    }
    assert evaluate(model, data, attacks).complete


def test_the_clean_accuracy_does_not_depend_on_the_order(model, data):
    attacks = [("p", PGD(model, normalize=MEAN)), ("f", FGSM(model, normalize=MEAN))]
    there, back = (evaluate(model, data, dict(order)) for order in (attacks, attacks[::-1]))
    assert there.clean_accuracy == back.clean_accuracy


class Weighted(Goal):
    """A goal of a user's own that holds tensors."""

    def __init__(self, weights):
        self.weights = weights
        self.by_name = {"also": [weights]}

    def reached(self, outputs, labels):
        return (outputs * self.weights).argmax(1) != labels

    def loss(self, outputs, labels):
        return -(outputs * self.weights).gather(1, labels.unsqueeze(1)).squeeze(1)


def test_goals_that_hold_tensors_are_compared_by_their_values(model, data):
    def attacks(*scales):
        return [PGD(model, 1e-6, goal=Weighted(scale * torch.ones(3))) for scale in scales]

    assert evaluate(model, data, attacks(1.0, 1.0), checks=False).worst_case.value == 1
    with pytest.raises(ValueError, match="attacks must have the same goal"):
        evaluate(model, data, attacks(1.0, 2.0), checks=False)


@pytest.mark.parametrize("eps", ["8/255", ["8/255"], [None], [torch.zeros(2)]])
def test_radii_that_are_no_numbers_are_refused(model, data, eps):
    with pytest.raises(TypeError, match="eps must be a list of radii"):
        evaluate(model, data, [PGD(model)], eps=eps)


def test_one_class_is_refused_by_attacks_that_need_verdicts_alone(data):
    attack = HopSkipJump(lambda x: x.flatten(1)[:, :1], steps=1)
    with pytest.raises(ValueError, match="at least 2 classes, got logits of 1; make two"):
        attack.run(data[0], torch.zeros_like(data[1]))


def test_bounds_of_single_elements_are_shown_by_their_shape(model, data):
    bounds = (torch.zeros(1, 4, 4), torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match=r"same bounds.*\(1, 4, 4\) up to 1.*\(0.0, 1.0\)"):
        evaluate(model, data, {"a": PGD(model, bounds=bounds), "b": PGD(model)})
    assert evaluate(model, data, [PGD(model, bounds=bounds, steps=1)] * 2).complete
