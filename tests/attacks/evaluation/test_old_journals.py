"""Journals and a checkpoint that earlier code wrote: they open, go on, and refuse what is
different."""

import json
import shutil

import journal_v1
import numpy
import pytest
import torch

from ironmoe.attacks import APGD, FAB, FGSM, PGD, FrozenRouting, JournalError, evaluate
from ironmoe.bench.common.checkpoints import load_checkpoint

REPORTS = json.loads((journal_v1.DATA / "reports.json").read_text())
COMPLETE = [name for name in journal_v1.SCENARIOS if name not in ("cut", "l1")]


@pytest.fixture(scope="module")
def model():
    inner, _ = load_checkpoint(journal_v1.DATA / "model.safetensors", torch.device("cpu"))
    return journal_v1.Stored(inner.double().eval())


@pytest.fixture
def folder(tmp_path):
    """A copy of a scenario's journal."""

    def copy(scenario):
        return shutil.copytree(journal_v1.DATA / scenario, tmp_path / scenario)

    return copy


def numbers(summary):
    fields = ("clean_correct", "passed", "fell", "decided", "prediction", "steps", "found")
    known = {name: getattr(summary, name).tolist() for name in fields}
    flags = {name: flag.tolist() for name, flag in summary.flags.items()}
    passes = {"forwards": summary.forwards, "backwards": summary.backwards}
    return known | passes | {"distance": summary.distance.tolist(), "flags": flags}


@pytest.mark.parametrize("scenario", COMPLETE)
def test_a_complete_journal_gives_its_numbers_and_asks_the_model_nothing(model, folder, scenario):
    handle = model.register_forward_pre_hook(lambda module, args: pytest.fail("asked"))
    report = journal_v1.run(scenario, model, folder(scenario))
    handle.remove()

    assert report.complete
    assert {name: numbers(one) for name, one in report.attacks.items()} == REPORTS[scenario]


def test_kept_images_are_read(model, folder):
    report = journal_v1.run("complete", model, folder("complete"))
    images, labels = journal_v1.data()
    for summary in report.attacks.values():
        assert torch.equal(model(summary.adversarial).argmax(1), summary.prediction)
        distance = (summary.adversarial - images).flatten(1).abs().amax(1)
        torch.testing.assert_close(distance, summary.distance)
        assert torch.equal(summary.prediction != labels, summary.fell | ~summary.clean_correct)


@pytest.mark.parametrize("scenario", ["cut", "l1"])
def test_a_journal_that_was_cut_off_goes_on(model, folder, scenario):
    """What was decided is not attacked again; the rest is attacked as it would have been."""
    path = folder(scenario)
    before = {(line["attack"], line["example"]): line for line in lines(path) if line["decided"]}
    report = journal_v1.run(scenario, model, path, max_forwards=None)
    assert report.complete and 0 < len(before) < 18

    for number, summary in enumerate(report.attacks.values()):
        for example in range(6):
            line = before.get((number, example))
            if line is not None:
                found = [bool(summary.fell[example]), int(summary.steps[example])]
                assert found == [bool(line["fell"]), line["steps"]]
                assert float(summary.distance[example]) == line["distance"]
    again = [(line["attack"], line["example"]) for line in lines(path) if line["decided"]]
    assert len(again) == len(set(again)) == 6 * len(report.attacks)

    if scenario == "cut":  # what the old code found without an interruption
        for name, summary in report.attacks.items():
            known = REPORTS[scenario][name]
            assert [summary.fell.tolist(), summary.prediction.tolist()] == [
                known["fell"],
                known["prediction"],
            ]


CHANGES = {
    "steps": lambda m: ("complete", "pgd", PGD(m, steps=5, restarts=2, seed=3)),
    "seed": lambda m: ("complete", "pgd", PGD(m, steps=4, restarts=2, seed=4)),
    "alpha": lambda m: ("complete", "pgd", PGD(m, alpha=0.1, steps=4, restarts=2, seed=3)),
    "loss": lambda m: ("complete", "fgsm", FGSM(m, loss="margin")),
    "early_stop": lambda m: ("complete", "fgsm", FGSM(m, early_stop=False)),
    "targeted loss": lambda m: ("complete", "apgd-t", APGD(m, steps=4, targets=2, loss="ce")),
    "rho": lambda m: ("complete", "apgd-t", APGD(m, steps=4, targets=2, rho=0.5)),
    "three_radii": lambda m: ("l1", "apgd", APGD(m, 1.0, steps=4, norm="L1", targets=1)),
    "another class": lambda m: ("complete", "fgsm", PGD(m, steps=1, random_start=False)),
    "beta": lambda m: ("cut", "fab", FAB(m, 0.1, steps=5, targets=2, beta=0.5)),
    "mode": lambda m: ("routing", "frozen", PGD(m, 0.1, steps=3)),
    "of a mode": lambda m: (
        "routing",
        "frozen",
        PGD(m, 0.1, steps=3, routing=FrozenRouting(gates="fresh")),
    ),
    "normalize": lambda m: ("options", "mean", PGD(m, 0.1, steps=2, eot=2)),
    "a user's attack": lambda m: ("options", "halfway", journal_v1.Halfway(m, 0.1, share=0.25)),
    "a user's relative": lambda m: ("options", "decaying", journal_v1.Decaying(m, 0.1, 2, twist=2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_setting_is_refused(model, folder, change):
    scenario, name, attack = CHANGES[change](model)
    attacks = journal_v1.arguments(scenario, model)["attacks"] | {name: attack}
    with pytest.raises(JournalError, match="attacks must be as in the journal"):
        journal_v1.run(scenario, model, folder(scenario), attacks=attacks)


def test_another_model_or_radius_is_refused(model, folder):
    path = folder("complete")
    with pytest.raises(JournalError, match="eps must be as in the journal"):
        journal_v1.run("complete", model, path, eps=[0.02])

    inner, _ = load_checkpoint(journal_v1.DATA / "model.safetensors", torch.device("cpu"))
    with torch.no_grad():
        next(inner.parameters()).add_(1e-3)
    other = journal_v1.Stored(inner.double())
    with pytest.raises(JournalError, match="model must be as in the journal"):
        journal_v1.run("complete", other, path)


def test_a_journal_of_a_later_format_is_refused(model, tmp_path):
    evaluate(model, journal_v1.data(), {"fgsm": FGSM(model)}, journal=tmp_path, checks=False)
    file = tmp_path / "journal-0.jsonl"
    head, *rest = file.read_text().splitlines()
    assert json.loads(head)["format"] == 2

    file.write_text("\n".join([json.dumps(json.loads(head) | {"format": 3}), *rest]) + "\n")
    with pytest.raises(JournalError, match=r"must be a journal of this program.*format 3"):
        evaluate(model, journal_v1.data(), {"fgsm": FGSM(model)}, journal=tmp_path, checks=False)


def test_a_checkpoint_of_earlier_code_gives_its_logits():
    inner, extra = load_checkpoint(journal_v1.DATA / "model.safetensors", torch.device("cpu"))
    expected = torch.tensor(numpy.load(journal_v1.DATA / "logits.npz")["logits"])
    images, _ = journal_v1.data()
    with torch.no_grad():
        logits = inner(images.float())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert extra == {"epochs": 60}


def lines(folder):
    """Every record, in the order of writing; a line that was torn is left out."""
    complete = (folder / "journal-0.jsonl").read_text().rpartition("\n")[0].splitlines()
    return [record for line in complete[1:] for record in json.loads(line)]
