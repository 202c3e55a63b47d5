"""What is noticed during a training, when it is said, and what is left of it after a kill."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from ironmoe.attacks.training import FGSMRS, CollapseAlarm, OverfittingGuard, RouterCollapseWarning
from ironmoe.bench.train.report.words import words
from ironmoe.bench.train.watch import Watch


def test_a_collapse_is_said_at_once_and_kept_when_the_training_then_fails(recwarn):
    watch, said = Watch(), []
    with pytest.raises(KeyboardInterrupt), watch.noticing(said.append):
        warnings.warn("router collapses", RouterCollapseWarning, stacklevel=1)
        assert said == ["router collapses"]
        warnings.warn("something else", stacklevel=1)
        raise KeyboardInterrupt
    assert watch.messages == said == ["router collapses"]
    assert [str(each.message) for each in recwarn.list] == ["something else"]


def test_what_guard_and_alarm_know_goes_on():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).double()
    images = torch.rand(40, 1, 4, 4).double()
    labels = model(images).argmax(1)
    method = FGSMRS(model, 0.3, ramp_steps=10)
    watch = Watch(OverfittingGuard(method, images, labels), method.alarm)
    watch.after_epoch(print)
    method.alarm._warned["moe", "load"] = 7
    state = json.loads(json.dumps(watch.state))
    assert state["guard"]["last_eps"] == 0.3 / 10 and len(state["guard"]["last_pgd"]) == 40

    other = Watch(OverfittingGuard(method, images, labels), CollapseAlarm())
    other.state = state
    assert json.loads(json.dumps(other.state)) == state
    with torch.no_grad():
        model[1].weight.neg_(), model[1].bias.neg_()
    said = []
    other.after_epoch(said.append)
    assert other.stopped and "at the last good check" in said[0]


def curve(epoch, robust, learned=True):
    return {"epoch": epoch, "clean": 0.5, "robust": robust, "chance": 0.1, "learned": learned}


@pytest.mark.parametrize(
    ("curves", "stopped", "said"),
    [
        ([curve(1, 0.4), curve(2, 0.3)], False, ["split. Because"]),
        (
            [curve(1, 0.4, False), curve(2, 0.3)],
            False,
            ["split, leaving out epochs whose clean accuracy could not be told from chance. "],
        ),
        (
            [curve(1, 0.4, False), curve(2, 0.3), curve(3, 0.5)],
            True,
            ["told from chance or at whose end the training was stopped. Because"],
        ),
    ],
)
def test_the_report_says_which_epochs_were_no_candidates(curves, stopped, said):
    facts = SimpleNamespace(
        training={"warnings": [], "chosen": 2, "curves": curves, "stopped": stopped},
        chosen=curves[1], held_out=200, eps="8/255", is_standard=False, attack=None,
    )  # fmt: skip
    text = " ".join(words(facts))
    assert all(part in text for part in said)
