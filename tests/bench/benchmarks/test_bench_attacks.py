"""``ironmoe bench attacks`` on tiny models, with and without a peer."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from ironmoe.attacks import PGD
from ironmoe.bench.benchmarks.attacks import run as benchmark
from ironmoe.bench.benchmarks.attacks.contests import Contest
from ironmoe.bench.benchmarks.attacks.libraries import PGDSettings, pgd_runs
from ironmoe.bench.benchmarks.attacks.models import _fit
from ironmoe.bench.benchmarks.attacks.time_left import EpochsLeft, TimeLeft
from ironmoe.bench.benchmarks.attacks.turns import Turn, is_whole
from ironmoe.bench.cli.app import app


def run(*arguments, ok=True):
    result = CliRunner().invoke(app, ["bench", "attacks", *map(str, arguments)])
    assert (result.exit_code == 0) == ok, result.output
    return result


def test_rows_and_ratios(tmp_path, monkeypatch):
    seen = []

    class Multi:
        def __init__(self, attacks):
            self.attacks = attacks

        def __call__(self, images, labels):
            seen.append(len(images))
            return images

    fake = SimpleNamespace(PGD=lambda model, **options: options, MultiAttack=Multi)
    monkeypatch.setitem(sys.modules, "torchattacks", fake)
    for name in ("foolbox", "adv_lib", "adv_lib.attacks", "autoattack"):
        monkeypatch.setitem(sys.modules, name, None)
    trainings = []

    def fit(model, images, labels, eps, epochs, on_epoch, *, state_file):
        trainings.append((eps, epochs))
        on_epoch(1)
        model.eval()

    monkeypatch.setattr("ironmoe.bench.benchmarks.attacks.models._fit", fit)
    options = [
        "--data",
        "digits",
        "--epochs",
        1,
        "--images",
        12,
        "--runs",
        2,
        "--parts",
        "pgd,bf16",
        "--folder",
        tmp_path / "models",
    ]
    output = run(*options, "--out", tmp_path / "rows.json").output
    assert "3 models to train first: about" in output and output.count("of training left") == 2
    assert trainings == [(0.0, 1), (0.1, 1), (0.0, 1)]  # the dense model is not asked for
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    places = list(dict.fromkeys((row["attack"], row["compared_with"]) for row in rows))
    # libraries take turns in a random order
    rows.sort(key=lambda r: (places.index((r["attack"], r["compared_with"])), r["library"]))
    pgd = [
        (library, model)
        for model in ("V-MoE", "robust V-MoE")
        for library in ("ironmoe", "torchattacks")
    ]
    wide = ["robust V-MoE", "wide V-MoE", "wide V-MoE"]
    bf16 = [(library, model) for model in wide for library in ("ironmoe", "ironmoe, bf16 search")]
    assert [(row["library"], row["model"]) for row in rows] == pgd + bf16
    assert seen == [12] * 4 and all(row["seconds"] > 0 and row["runs"] == 2 for row in rows)
    # The fake peer attacks nothing: where that leaves more images, no ratio is printed.
    for ours, other in zip(rows[0:4:2], rows[1:4:2], strict=True):
        apart = other["robust"]["value"] - ours["robust"]["value"]
        assert (other["ratio"] is None) == (abs(apart) > 0.02)
    assert "Not installed here" in output and "foolbox, adv-lib, official" in output
    assert all(len(row["times"]) == 2 and len(row["held"]) == 12 for row in rows)

    assert all(map(is_whole, rows))
    for change in (
        {"seconds": 1e9},
        {"times": [1.0]},
        {"runs": 3},
        {"held": rows[0]["held"][:-1]},
        {"held": "x" * 12},
        {"robust": rows[0]["robust"] | {"count": 13}},
        {"robust": None},
        {"times": []},
    ):
        assert not is_whole(rows[0] | change), change

    seen.clear()
    again = run(*options, "--out", tmp_path / "rows.json").output
    assert "All 10 rows are in" in again and "--again" in again and seen == []
    assert "epoch" in output and "epoch" not in again  # the models are kept

    options[options.index("pgd,bf16")] = "pgd"
    # Another command finds the models and has its own rows, of which a stop leaves the first.
    whole, calls = benchmark.take, []

    def once(turn, *rest):
        if calls:
            raise KeyboardInterrupt
        calls.append(turn.library)
        return whole(turn, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "take", once)
        cut = run(*options, "--out", tmp_path / "cut.json", ok=False)
    assert cut.exit_code == 130 and "the same command goes on" in cut.output
    (row,) = json.loads((tmp_path / "cut.json").read_text())["rows"]
    assert (row["library"], row["runs"]) == (calls[0], 1) and row["seconds"] > 0
    text = run(*options, "--out", tmp_path / "cut.json", "--format", "csv").stdout
    table = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [entry["library"] for entry in table] == [library for library, _ in pgd]
    assert all(entry["runs"] == "2" for entry in table)
    kept = json.loads((tmp_path / "cut.json").read_text())
    first = next(entry for entry in kept["rows"] if entry["library"] == row["library"])
    assert first["times"][0] == row["times"][0] and len(kept["sessions"]) == 2


def test_a_training_that_was_interrupted_goes_on_with_the_same_adversary(tmp_path):
    images = torch.rand(250, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = (images.mean((1, 2, 3)) > 0.5).long()

    def fitted(file, stop_after=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))

        def on_epoch(epoch):
            if epoch == stop_after:
                raise KeyboardInterrupt

        _fit(model, images, labels, 0.1, 4, on_epoch, state_file=file)
        return model[1].weight

    whole = fitted(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "cut", stop_after=3)  # the radius grows until then
    assert torch.equal(fitted(tmp_path / "cut"), whole)


def test_a_library_that_is_not_there_is_left_out(monkeypatch):
    for name in ("torchattacks", "foolbox", "adv_lib", "adv_lib.attacks"):
        monkeypatch.setitem(sys.modules, name, None)
    runs = pgd_runs(PGDSettings(0.1, 0.02, 3, 1, 8))
    assert list(runs) == ["ironmoe"]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 3))
    x = torch.rand(8, 1, 3, 3)
    assert runs["ironmoe"](model, x, model(x).argmax(1)).dtype == torch.bool


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--parts", "pgd,fgsm"], "--parts must be among"), (["--runs", 0], "runs")],
)
def test_bad_options_are_named(options, message):
    assert message in run(*options, ok=False).output


def test_adversarial_training_makes_a_model_hold_longer():
    images, labels = (
        torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.arange(200) % 2,
    )
    images[labels == 1, :, :4] *= 0.6
    held = []
    for eps in (0.0, 0.1):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 2)
        )
        _fit(model, images, labels, eps, 20, lambda epoch: None)
        held.append(PGD(model, 0.1, steps=10).run(images, labels).robust.sum())
    assert held[1] > held[0]


def test_the_time_of_epochs_that_an_earlier_command_made_is_not_left(monkeypatch):
    clock = iter([0.0, 20.0, 30.0, 40.0, 50.0])
    fake = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("ironmoe.bench.benchmarks.attacks.time_left.time", fake)
    left = EpochsLeft({"one": 10.0, "other": 20.0}, 3)
    assert left.in_words() == "about 2 min"  # 90 s
    left.note("one", 2)  # the first one was made before; it took twice as long as expected
    assert left.in_words() == "about 2 min"  # 2 · (10 + 60) s
    for name, epoch in (("one", 3), ("other", 2), ("other", 3)):
        left.note(name, epoch)
    assert left.in_words() == ""


def test_the_time_left_has_two_ends_that_meet_once_all_libraries_have_run():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 3))
    runs = {"ironmoe": None, "peer": None}
    contest = Contest("m", "PGD", runs, images=8, rounds=2, passes=100)
    turns = [Turn(contest, library, number) for number in (0, 1) for library in runs]
    left = TimeLeft(turns, {"m": model}, torch.rand(8, 1, 3, 3), 8)
    least, most = left.ends()
    assert least == 0 < most and left.in_words().startswith("at most about")
    left.note(turns[0], 3.0)
    least, most = left.ends()
    assert least == 9.0 <= most  # the peer's runs take 3 s at least, as far as is known
    left.note(turns[1], 5.0)
    assert left.ends() == (8.0, 8.0) and left.in_words() == "about 8 s"
