"""The part ``methods`` of ``ironmoe bench training``: runs that are kept, and what they say
together."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ironmoe.attacks.training import TRAINING_METHODS
from ironmoe.bench.benchmarks.training import runs
from ironmoe.bench.benchmarks.training.evaluation import EvaluationSettings, evaluated
from ironmoe.bench.benchmarks.training.method_tables import (
    method_results,
    methods_markdown,
    model_differences,
)
from ironmoe.bench.benchmarks.training.runs import VARIANTS, Run, StudySettings, expected_ends
from ironmoe.bench.cli.app import app
from ironmoe.bench.data.in_memory import ImageData, load_data
from ironmoe.bench.train.held_out import HeldOutRows
from ironmoe.moe import VMoE

PARTLY = ["--images", 8, "--apgd-images", 4, "--apgd-steps", 3, "--epochs", 1]


def tiny_arguments(name, data):
    experts = {"moe_layers": (0,), "num_experts": 4, "top_k": 2} if name == "v-moe" else {}
    sizes = {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 32}
    return {**sizes, "channels": 1, "num_classes": len(data.classes), **experts}


def tiny(name, data, seed):
    torch.manual_seed(seed)
    return VMoE(**tiny_arguments(name, data))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Tiny models, and 150 digits of 5 classes in a file."""
    monkeypatch.setattr(runs, "new_model", tiny)
    monkeypatch.setattr(runs, "model_arguments", tiny_arguments)
    digits = load_data("digits")
    first = torch.cat([torch.nonzero(digits.labels == label)[:30, 0] for label in range(5)])
    images, labels = digits.images[first, 0].numpy(), digits.labels[first].numpy()
    np.savez(tmp_path / "few.npz", images=images, labels=labels)
    return ["--parts", "methods", "--data", tmp_path / "few.npz", "--folder", tmp_path / "kept"]


def run(*arguments, ok=True):
    result = CliRunner().invoke(app, ["bench", "training", *map(str, arguments)])
    assert (result.exit_code == 0) == ok, result.output
    return result.output


def test_a_finished_run_is_kept_and_not_done_again(small, tmp_path, monkeypatch):
    options = [*small, *PARTLY, "--models", "v-moe", "--methods", "standard,pgd-at"]
    output = run(*options, "--seeds", 0, "--out", tmp_path / "rows.json")
    assert "v-moe, pgd-at, seed 0: clean" in output
    assert "2 trainings to make and to evaluate: " in output
    entries = json.loads((tmp_path / "rows.json").read_text())["methods"]
    assert all(entry["made"]["machine"]["processor"] for entry in entries)
    rows = {row["method"]: row for entry in entries for row in entry["rows"]}
    assert set(rows) == {"standard", "pgd-at"}
    assert [rows["pgd-at"][key]["total"] for key in ("clean", "pgd", "apgd-t")] == [30, 8, 4]
    assert rows["pgd-at"]["train_seconds"] > 0 and len(rows["pgd-at"]["curves"]) == 1

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "_train", never)
    output = run(*options, "--seeds", 0)
    assert "2/2" in output and "to make" not in output
    # an evaluation that was interrupted finds the weights
    (tmp_path / "kept" / "methods" / "v-moe-pgd-at-seed0.json").unlink()
    assert "2/2" in run(*options, "--seeds", 0)
    again = json.loads((tmp_path / "kept" / "methods" / "v-moe-pgd-at-seed0.json").read_text())
    assert again["rows"] == [rows["pgd-at"]]
    file = tmp_path / "kept" / "methods" / "v-moe-pgd-at-seed0.json"
    for share in ({"value": 0.123}, {"count": -1}, {"total": 0}, {"total": None}):
        damaged = rows["pgd-at"] | {"pgd": rows["pgd-at"]["pgd"] | share}
        file.write_text(json.dumps(again | {"rows": [damaged]}))
        assert "measured anew: v-moe-pgd-at-seed0.json" in run(*options, "--seeds", 0)
        assert json.loads(file.read_text())["rows"] == [rows["pgd-at"]]
    assert "apgd_steps: 3 there, 4 now" in run(*options, "--apgd-steps", 4, ok=False)


def test_the_expected_time_counts_the_passes_of_training_and_evaluation(monkeypatch):
    """1 s a pass. Test images are tested once; 8 of them are attacked by 20 steps of PGD, and 4 by
    3 steps at each of 4 targets."""
    monkeypatch.setattr(runs, "_pass_seconds", lambda model, data: 1.0)
    digits = load_data("digits")
    data = replace(digits, classes=digits.classes[:5])
    trained, tested = len(runs.split(data).trained), len(data.split()[1])
    settings = StudySettings(4, EvaluationSettings(0.1, 8, 4, 3))
    attacked = 20 * 8 + 3 * 4 * 4
    for method, passes in {"standard": 1, "pgd-at": 5, "fgsm-rs": 2, "free": 1}.items():
        least = 4 * passes * trained + tested
        found = expected_ends([Run("vit", method, 0)], data, settings)
        assert found == (least, least + attacked), method


def test_a_training_that_was_killed_goes_on_with_the_same_numbers(small, tmp_path, monkeypatch):
    options = [*small, *PARTLY, "--epochs", 2, "--models", "v-moe", "--methods", "fgsm-rs"]
    measure, calls = HeldOutRows.measure, []

    def killed_in_the_second_epoch(self, model):
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, model)

    monkeypatch.setattr(HeldOutRows, "measure", killed_in_the_second_epoch)
    run(*options, "--seeds", 0, ok=False)
    others = run(*options, "--seeds", 0, "--epochs", 3, ok=False)
    assert "epochs: 2 there, 3 now" in " ".join(others.split())
    run(*options, "--seeds", 0)
    assert len(calls) == 3  # the first epoch was not trained again
    run(*options, "--seeds", 0, "--folder", tmp_path / "at once")
    name = "methods/v-moe-fgsm-rs-seed0.json"
    (again,), (at_once,) = (
        json.loads((tmp_path / folder / name).read_text())["rows"] for folder in ("kept", "at once")
    )
    for row in (again, at_once):
        del row["train_seconds"]
    assert again == at_once and len(again["curves"]) == 2


def test_processes_with_other_seeds_fill_one_table(small, tmp_path):
    """Methods that need experts are left out on a dense model."""
    for seed in (0, 1):
        methods = ["--models", "vit", "--methods", "pgd-at,second-ranked", "--seeds", seed]
        output = run(*small, *PARTLY, *methods)
        assert "1/1" in output and "second-ranked" not in output
    markdown = (tmp_path / "kept" / "methods" / "table.md").read_text()
    (line,) = [line for line in markdown.splitlines() if line.startswith("| ViT")]
    assert "| 2 |" in line and "±" in line
    assert not list((tmp_path / "kept").rglob("*.state"))


def test_every_variant_is_a_method_and_every_method_has_a_variant():
    assert {variant.method for variant in VARIANTS.values()} == set(TRAINING_METHODS)
    names = [Run("v-moe", method, 0).name for method in VARIANTS]
    assert len(set(names)) == len(names)
    for name, entry in TRAINING_METHODS.items():
        assert Run("vit", name, 0).is_possible() == (not entry.needs_experts)
        assert Run("v-moe", name, 0).is_possible()


def test_accuracies_are_those_of_a_model_that_is_known():
    """Images of one value, and a model that tells classes by it: nothing changes the verdict within
    a small eps, and everything does within a large one."""
    values = torch.linspace(0.1, 0.9, 5)
    labels = torch.arange(50) % 5
    images = values[labels].view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()
    data = ImageData("levels", images, labels, list("abcde"), [])

    def model(x):
        return -100 * (x.mean((1, 2, 3))[:, None] - values).square()

    for eps, robust in ((0.05, 1.0), (0.15, 0.0)):
        settings = EvaluationSettings(eps, pgd_images=10, apgd_images=5, apgd_steps=10)
        found = evaluated(model, data, settings)
        assert found["clean"]["value"] == 1
        assert found["pgd"]["value"] == found["apgd-t"]["value"] == robust


def row(method, seed, value, model="vit"):
    accuracy = {measure: {"value": value} for measure in ("clean", "pgd", "apgd-t")}
    return {
        "model": model,
        "method": method,
        "seed": seed,
        "train_seconds": 2.0,
        "stopped": 0,
    } | accuracy


def test_runs_are_paired_by_seed_within_a_model():
    """Seed 2 has no partner, and the other model is none."""
    rows = [row("pgd-at", seed, 0.5 + seed / 10) for seed in (0, 1)]
    rows += [row("trades", seed, 0.6 + seed / 10) for seed in (1, 0, 2)]
    rows += [row("trades", 0, 0.1, "v-moe")]
    base, trades, other = method_results(rows)
    assert base.difference["pgd"] is None and other.difference["pgd"] is None
    assert trades.accuracy["pgd"].mean == pytest.approx(70) and trades.accuracy["pgd"].runs == 3
    difference = trades.difference["pgd"]
    assert difference.pairs == 2 and difference.mean == pytest.approx(10)
    lines = methods_markdown([base, trades, other]).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 5
    assert "70.0 ± 10.0" in lines[3] and "+10.0 [+10.0, +10.0]" in lines[3]
    assert "| 10.0 |" in lines[4]


def test_runs_at_a_larger_eps_are_compared_with_those_at_the_same_eps():
    rows = [row("pgd-at", seed, 0.9) for seed in (0, 1)]
    rows += [row("pgd-at-3eps", seed, 0.4) for seed in (0, 1)]
    rows += [row("fgsm-rs-3eps", seed, 0.1) for seed in (0, 1)]
    results = {result.method: result.difference["pgd"] for result in method_results(rows)}
    assert results["pgd-at"] is results["pgd-at-3eps"] is None
    assert results["fgsm-rs-3eps"].mean == pytest.approx(-30)


def test_a_model_with_experts_is_paired_with_the_dense_one_of_its_seed():
    rows = [row("trades", seed, 0.5 + seed / 10) for seed in (0, 1)]
    rows += [row("trades", seed, 0.7 + seed / 10, "v-moe") for seed in (1, 0, 2)]
    rows += [row("second-ranked", 0, 0.5, "v-moe")]
    (found,) = model_differences(rows)
    assert found.method == "trades" and found.difference["clean"].pairs == 2
    assert found.difference["apgd-t"].mean == pytest.approx(20)
    assert "| trades | +20.0 [+20.0, +20.0] |" in methods_markdown([], [found])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "pgd"], "--methods must be among standard"),
        (["--seeds", "0,-1"], "--seeds must be integers"),
    ],
)
def test_bad_options_are_named(options, message):
    assert message in " ".join(run(*options, ok=False).replace("│", " ").split())
