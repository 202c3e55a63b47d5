"""``ironmoe train`` from end to end on tiny settings: its files, its kills and its errors."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ironmoe.attacks.training import TRAINING_METHODS
from ironmoe.bench.cli.app import app
from ironmoe.bench.cli.train import train as train_command
from ironmoe.bench.train import run
from ironmoe.bench.train.display import Display
from ironmoe.bench.train.options import takes_steps
from ironmoe.bench.train.report import page, pictures

PLAIN = ("--method", "standard", "--batch-size", 16, "--epochs")
SHORT = ("--batch-size", 16, "--eps", 16, "--steps", 2, "--epochs")
TINY = ("--model", "small_models:moe", *SHORT)
KILLED = """
import os, signal, sys, torch

last = int(sys.argv.pop(1))
from ironmoe.bench.train import run
from ironmoe.bench.train.display import Display

torch.set_num_threads(1)
shown = Display.batch
def batch(self, step, now):
    shown(self, step, now)
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)
Display.batch = batch

from ironmoe.bench.__main__ import main
main()
"""


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_train_writes_weights_that_attack_takes_and_a_report(
    place, train, no_pictures, monkeypatch
):
    monkeypatch.setattr(page, "draw_training", pictures.draw_training)
    result = train(*TINY, 2, "--attack-images", 8, "--out", "run")
    folder = place / "run"
    report = json.loads((folder / "report.json").read_text())
    html = (folder / "report.html").read_text()

    assert [line["epoch"] for line in report["curves"]] == [1, 2]
    last = report["curves"][-1]
    assert last["eps"] == pytest.approx(16 / 255)
    assert set(last["load"]) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert all(0.25 <= share <= 0.5 for share in last["load"].values())
    assert report["attack"]["clean"]["total"] == 8 and len(report["attack"]["worst_case"]) == 1
    attack = json.loads((folder / "attack" / "report.json").read_text())
    assert report["attack"]["at_chance"] == attack["at_chance"]
    assert "epoch 2/2" in result.output and "held out" in result.output
    assert html.count("data:image/png;base64,") == 3
    assert "one training" in html and not re.search(r'(src|href)="(?!data:)', html)
    assert not list(folder.glob("*.state")) and not list(folder.glob("**/*.partial"))

    again = CliRunner().invoke(
        app,
        ["attack", "--model", "small_models:moe", "--weights", "run/model.safetensors",
         "--data", "set.npz", "--attack", "pgd", "--steps", "1", "--attack-images", "8",
         "--no-checks", "--eps", "16", "--out", "attacked"],
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    clean = json.loads((place / "attacked" / "report.json").read_text())["report"]["clean"]
    assert clean == report["attack"]["clean"]


def test_what_saves_time_and_memory_goes_together_and_the_attack_keeps_to_it(
    place, train, monkeypatch
):
    """A radius of the norm's own, and as many images at once as a part has, in its dtype."""
    attacked, compiled = [], []
    monkeypatch.setattr("torch.nn.Module.compile", lambda self: compiled.append(self))
    monkeypatch.setattr(
        run, "run_attack_command", lambda options, console: attacked.append(options)
    )
    result = train(
        "--model", "small_models:moe", "--batch-size", 16, "--epochs", 1, "--steps", 1, "--compile",
        "--norm", "L2", "--dtype", "bfloat16", "--schedule", "cosine", "--checkpointing",
        "--parts", 4, "--ema", 0.9, "--out", "run",
    )  # fmt: skip
    assert "pgd-at in L2 at eps 128/255" in " ".join(result.output.split())
    (options,) = attacked
    assert options.batch_size == 4 and len(compiled) == 1
    assert (options.suite.dtype, options.suite.norm) == ("bfloat16", "L2")
    assert options.suite.eps_255 == (128,)


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(
    place, train, monkeypatch
):
    train(*TINY, 1, "--no-attack", "--out", "run")
    monkeypatch.setattr(Display, "batch", lambda *arguments: pytest.fail("trained again"))
    (place / "run/training.state").touch()  # a kill left it behind
    train(*TINY, 1, "--no-attack", "--out", "run")
    assert not (place / "run/training.state").exists()
    refused = train(*TINY, 2, "--no-attack", "--out", "run", ok=False)
    assert refused.exit_code == 2
    assert "other settings (recipe.epochs" in " ".join(refused.output.split())


def test_killed_after_the_last_epoch_it_only_writes_what_is_missing(place, train, monkeypatch):
    command = (*TINY, 1, "--no-attack", "--out", "run")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_json", full)
        assert train(*command, ok=False).exit_code == 1
    state = place / "run/training.state"
    whole = state.read_bytes()
    state.write_bytes(whole[:-8])
    torn = train(*command, ok=False)
    assert torn.exit_code == 2
    assert "ironmoe: checkpoint run/training.state cannot be read" in torn.output
    state.write_bytes(whole)
    monkeypatch.setattr(Display, "batch", lambda *arguments: pytest.fail("trained again"))
    train(*command)
    assert (place / "run" / "report.html").is_file()


def test_what_is_about_to_be_done_is_said_first_and_a_model_at_chance_last(place, train):
    model = ("--model", "small_models:dense")
    result = train(*model, *SHORT, 1, "--learning-rate", 1e-9, "--no-attack", "--out", "run")
    output = " ".join(result.output.split())
    before, after = output.split("epoch 1/1", 1)
    assert "pgd-at in Linf at eps 16/255, 2 steps of 20/255; 1 epoch of " in before
    assert "cannot be told from chance, 25 % for 4 classes" in after


def test_a_capacity_that_couples_images_works_and_the_report_says_so(place, train):
    result = train("--model", "small_models:crowded", *SHORT, 1, "--no-attack", "--out", "run")
    message = "images of a batch take places from each other"
    assert message in result.output
    assert message in (place / "run" / "report.html").read_text()


def test_a_checkpoint_of_a_named_model_is_loaded_and_trained_on(place, train):
    train("--model", "vit", *PLAIN, 1, "--no-attack", "--out", "first")
    own = "first/model.safetensors"
    train("--model", own, *SHORT, 1, "--no-attack", "--out", "second")
    again = CliRunner().invoke(
        app,
        ["attack", "second/model.safetensors", "--data", "set.npz", "--attack", "fgsm",
         "--attack-images", "4", "--no-checks", "--eps", "16", "--out", "attacked"],
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert "pgd-at" in again.output


def test_killed_at_any_moment_it_goes_on_to_the_same_weights(place, train):
    model = ("--model", "small_models:moe", "--batch-size", 16, "--eps", 16)
    command = (*model, "--epochs", 3, "--method", "fgsm-rs", "--no-attack", "--out")
    train(*command, "whole")

    (place / "killed.py").write_text(KILLED)
    arguments = ["train", "--data", "set.npz", "--device", "cpu", *map(str, command), "killed"]
    killed = subprocess.run(
        [sys.executable, "killed.py", "4", *arguments],  # in the middle of the second epoch
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{place}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert (place / "killed" / "training.state").is_file()

    went_on = train(*command, "killed")
    assert "Going on" in went_on.output and "epoch 1/3" not in went_on.output
    assert_equal_weights(place / "whole", place / "killed")
    reports = [json.loads((place / f / "report.json").read_text()) for f in ("whole", "killed")]
    assert reports[0]["curves"] == reports[1]["curves"]


@pytest.mark.parametrize(
    "method",
    [
        ("--method", "free", "--replays", 2, "--ema", 0.9, "--parts", 2),
        ("--method", "alternating", "--steps", 1, "--awp", 0.01, "--routing", "gates-only"),
    ],
    ids=["free", "alternating"],
)
def test_what_methods_optimizers_and_averages_keep_goes_on_too(place, train, method, monkeypatch):
    command = ("--model", "small_models:moe", "--batch-size", 16, "--epochs", 2, "--no-attack")
    train(*command, *method, "--out", "whole")

    def stop(self, step, now):
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "batch", stop)
        assert train(*command, *method, "--out", "parts", ok=False).exit_code == 130
    train(*command, *method, "--out", "parts")
    assert_equal_weights(place / "whole", place / "parts")


def test_a_loss_that_is_not_finite_names_step_and_layer_and_keeps_the_last_weights(place, train):
    failed = train("--model", "small_models:Net", *PLAIN, 4, "--out", "run", ok=False)
    message = " ".join(failed.output.split())
    assert failed.exit_code == 2
    assert "step 5" in message and "'breaks" in message
    kept = load_file(place / "run" / "last-good.safetensors")
    assert "after epoch 1 are kept in run/last-good.safetensors" in message
    assert kept["breaks.second.weight"].isfinite().all()


BAD = {
    "eps": (["--eps", 0], "--eps must be finite and above 0, got 0"),
    "method": (["--method", "magic"], "--method must be one of "),
    "model": (["--model", "resnet"], "--model must be v-moe, vit, a paper's name"),
    "paper": (["--model", "V-MoE-Q/4"], "SIZE one of"),
    "data": (["--data", "nowhere"], "data must be one of mnist"),
    "option": (["--method", "pgd-at", "--beta", 1], "not to pgd-at"),
    "batch": (["--batch-size", 500], "must have at least 500 images to train on, as many as"),
    "parts": (["--parts", 200], "--parts must be at most --batch-size, 36, got 200"),
    "norm": (["--norm", "L7"], "--norm must be one of Linf"),
    "schedule": (["--schedule", "steps"], "--schedule must be one of one-cycle, cosine"),
    "blocks": (
        ["--model", "small_models:with_batch_norm", "--checkpointing"],
        "--checkpointing needs a model with a list of equal blocks",
    ),
    "batch norm": (
        ["--model", "small_models:with_batch_norm", "--batch-size", 1],
        "--batch-size / --parts must be at least 2",
    ),
    "dense": (
        ["--model", "vit", "--method", "routing-consistency"],
        "--method routing-consistency needs a model with experts",
    ),
    "routing": (["--model", "vit", "--routing", "frozen"], "--routing frozen needs a model with"),
    "frozen router": (
        ["--model", "small_models:with_frozen_routers", "--method", "alternating"],
        "routers must have a weight that requires gradients",
    ),
    "frozen": (["--model", "small_models:frozen"], "must have weights that require gradients"),
    "not differentiable": (
        ["--model", "small_models:Detached", "--method", "trades"],
        "--method trades: ",
    ),
    "one step": (["--method", "fgsm-rs", "--steps", 3], "--steps does not apply to"),
    "no attack": (["--method", "standard", "--alpha", 3], "--alpha does not apply to --method st"),
    "free routing": (
        ["--method", "free", "--routing", "frozen"],
        "--routing does not apply to --method free, which attacks by the backward pass",
    ),
    "free mode": (["--method", "free", "--mode", "train"], "--mode does not apply to --method fre"),
    "no mode": (["--method", "standard", "--mode", "train"], "--mode does not apply to"),
    "mode": (["--mode", "test"], "--mode must be one of eval, train, got 'test'"),
    "seed": (["--seed", 2**64], "must be from 0 to 1000000000000, got 18446744073709551616"),
    "ema": (["--ema", 1], "--ema must be above 0 and below 1"),
    "smoothing": (["--label-smoothing", 1], "--label-smoothing must be from 0 to below 1"),
}


def test_methods_that_take_no_steps_are_guarded():
    """Each of them can overfit to its one step; Free was without a guard once."""
    guarded = {name for name, entry in TRAINING_METHODS.items() if entry.single_step}
    assert guarded == {n for n, entry in TRAINING_METHODS.items() if not takes_steps(entry)}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(place, train, case):
    options, line = BAD[case]
    result = train("--epochs", 1, *options, "--out", "run", ok=False)
    assert result.exit_code == 2, result.output
    assert line in " ".join(result.output.split())


def test_data_of_one_class_are_refused(place, train):
    np.savez("set.npz", images=np.zeros((20, 8, 8), dtype=np.uint8), labels=np.zeros(20, dtype=int))
    result = train("--epochs", 1, ok=False)
    assert result.exit_code == 2
    assert "must hold images of at least 2 classes, got 20 of class 0 alone" in " ".join(
        result.output.split()
    )


def test_weights_alone_need_their_model(place, train):
    train("--model", "small_models:dense", *SHORT, 1, "--no-attack", "--out", "run")
    weights = "run/model.safetensors"
    cases = (
        ([weights], f"take --model … --weights {weights}"),
        (["--weights", weights], f"--weights {weights} must come with --model, got no model"),
        (
            ["--model", "small_models:dense", "--weights", "set.npz"],
            "cannot be read as safetensors",
        ),
        (["--model", "small_models:moe", "--weights", weights], "weights of another architecture"),
    )
    for options, message in cases:
        arguments = ["attack", *options, "--data", "set.npz", "--out", "attacked"]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split())


def test_every_option_of_a_method_is_an_option_of_the_command():
    """A method that is registered with another option needs it in ``bench/cli/train.py``."""
    options = inspect.signature(train_command).parameters
    for method in TRAINING_METHODS.values():
        assert set(method.takes) <= options.keys(), method.name
    help_text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    assert all(name in help_text for name in TRAINING_METHODS) and "{" not in help_text
