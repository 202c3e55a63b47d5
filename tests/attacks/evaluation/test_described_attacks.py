"""What a journal says of an attack: everything that a user chose, in today's and in former code."""

import json

import pytest
import torch
from torch import nn

from ironmoe.attacks import APGD, PGD, Attack, JournalError, evaluate
from ironmoe.attacks.evaluation.describe import describe_attack
from ironmoe.attacks.evaluation.old_journals import translated

LOSS = f"{__name__}.loss"
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def loss(logits, labels):
    return nn.functional.cross_entropy(logits, labels, reduction="none")


class Own(Attack):
    """An attack of a user, with attributes of his own."""

    gradient = False

    def __init__(self, model, eps=0.1, *, attributes, **options):
        super().__init__(model, eps, **options)
        self.max_queries = 1
        vars(self).update(attributes)

    def start(self, attempts):
        attempts["point"] = attempts["clean"]

    def advance(self, attempts, logits, loss, grad):
        attempts["finished"] = attempts["finished"] | True


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (APGD(MODEL, steps=2), APGD(MODEL, steps=2, early_stop=False)),
        (Own(MODEL, attributes={"routing": 1}), Own(MODEL, attributes={"routing": 2})),
        (Own(MODEL, attributes={"normalize": 1}), Own(MODEL, attributes={"normalize": 2})),
        (Own(MODEL, attributes={"loss_of": loss}), Own(MODEL, attributes={"loss_of": len})),
        (
            Own(MODEL, attributes={"inner": PGD(MODEL, steps=2)}),
            Own(MODEL, attributes={"inner": PGD(MODEL, steps=3)}),
        ),
    ],
    ids=["early_stop", "routing of its own", "normalize of its own", "loss_of", "attack inside"],
)
def test_a_journal_goes_on_with_the_same_attack_alone(first, second, tmp_path):
    images = torch.rand(3, 3, 2, 2)
    data = (images, MODEL(images).argmax(1))
    evaluate(MODEL, data, {"a": first}, journal=tmp_path, checks=False)
    evaluate(MODEL, data, {"a": first}, journal=tmp_path, checks=False)
    with pytest.raises(JournalError, match="attacks must be as in the journal"):
        evaluate(MODEL, data, {"a": second}, journal=tmp_path, checks=False)


def former(kind, **attributes):
    """An attack as the first code with journals told it: every attribute, the model's beside."""
    common = {
        "eps": 0.1, "norm": "Linf", "bounds": [0.0, 1.0], "seed": 0, "targeted": False, "eot": 1,
        "name": kind.rpartition(".")[2], "joint": False, "coupled": False,
    }  # fmt: skip
    victim = {
        "kind": "ironmoe.attacks.victim.Victim",
        "attack_dtype": None,
        "logits_fn": None,
        "normalize": None,
        "routing": {"kind": "ironmoe.attacks.routing.RoutingMode"},
    }
    return {"kind": kind, **common, "victim": victim, **attributes}


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"schedule": {"a": 1}}, {"schedule": {"a": 1}}),
        ({"loss_of": loss}, {"loss_of": LOSS}),
        ({"loss_of": loss, "auxiliary_loss": 0.5}, {"loss_of": LOSS, "auxiliary_loss": 0.5}),
        (
            {"alpha": 0.1, "random_start": False, "early_stop": True, "loss_of": loss},
            {"alpha": 0.1, "random_start": False, "early_stop": True, "loss_of": LOSS},
        ),
        (
            {"inner": Own(MODEL, attributes={"steps": 2})},
            {"inner": former(f"{__name__}.Own", queries=1, steps=2)},
        ),
    ],
)  # fmt: skip
def test_an_old_journal_tells_an_attack_of_a_user_as_today(attributes, told):
    today = json.loads(json.dumps(describe_attack(Own(MODEL, attributes=attributes))))
    old = {"attacks": {"a": [former(f"{__name__}.Own", queries=1, **told)]}}
    assert translated(old)["attacks"]["a"] == today


def test_a_journal_of_another_evaluation_says_what_differs_and_no_more(tmp_path):
    images = torch.rand(3, 3, 2, 2)
    data = (images, MODEL(images).argmax(1))
    evaluate(MODEL, data, {"a": PGD(MODEL, steps=2)}, journal=tmp_path, checks=False)
    cases = (
        ({"a": PGD(MODEL, steps=3)}, "attacks.a.0.settings.steps: 2 there, 3 now; use another"),
        ({"a": PGD(MODEL, steps=2, eot=2)}, "attacks.a.0.settings.eot: 1 there, 2 now; use"),
    )
    for attacks, message in cases:
        with pytest.raises(JournalError) as caught:
            evaluate(MODEL, data, attacks, journal=tmp_path, checks=False, passes=1)
        assert message in str(caught.value) and "norm" not in str(caught.value)
