"""The command line from end to end on tiny settings, its files, its interruptions and its
errors."""

import errno
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from ironmoe.bench.benchmarks import peers
from ironmoe.bench.benchmarks.cpu import run as cpu
from ironmoe.bench.benchmarks.shapes import Shape
from ironmoe.bench.cli.app import app
from ironmoe.bench.common.checkpoints import (
    ARCHITECTURES,
    CheckpointError,
    architecture,
    count_flops,
    load_checkpoint,
    save_checkpoint,
)
from ironmoe.bench.common.files import slug
from ironmoe.bench.common.run_folder import OutputError, RunFolder
from ironmoe.bench.common.train import Recipe, train
from ironmoe.bench.demo import plots
from ironmoe.bench.demo import run as demo
from ironmoe.moe import VMoE

TINY = [
    "--data",
    "digits",
    "--epochs",
    "1",
    "--eps",
    "4,16",
    "--steps",
    "2",
    "--restarts",
    "1",
    "--attack-images",
    "40",
    "--device",
    "cpu",
]


def run(*arguments, ok=True):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    if ok:
        assert result.exit_code == 0, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of a finished run of two seeds, what it printed)."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, run("demo", *TINY, "--seeds", 2, "--out", folder).output


class Stopped(NamedTuple):
    """A run of one seed that was stopped in each stage, and begun again each time until its end.

    interrupted: what Ctrl-C led to; full: the same of a disk that is full, and how many attacks
    were on it then; output: what the last one printed, which got to the end.
    """

    folder: Path
    interrupted: list[Result]
    full: Result
    attacks_when_full: int
    output: str


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    command = ["demo", *TINY, "--out", folder]

    def stop(where, error):
        def fails(*args, **kwargs):
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo, where, fails)
            return run(*command, ok=False)

    # The first model is trained, attacked and looked into; then the second one.
    stages = ("measure_robust", "measure_routing", "train")
    interrupted = [stop(where, KeyboardInterrupt()) for where in stages]
    full = stop("measure_robust", OSError(28, "No space left on device"))
    attacks = len(list(folder.glob("results/*-attacks.json")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_all", lambda *arguments: {})  # they take most of the time
        return Stopped(folder, interrupted, full, attacks, run(*command).output)


@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (1, 8, 8), (3, 32, 32), (3, 20, 20), (3, 64, 64), (1, 4, 4)]
)
def test_the_two_architectures_have_equal_flops(shape):
    flops = [count_flops(VMoE(**architecture(name, shape, 10)), shape) for name in ARCHITECTURES]
    assert abs(flops[0] / flops[1] - 1) < 0.02


def test_flops_of_a_known_model():
    model = VMoE(8, 4, 16, 1, 2, 32, 5, channels=1, classifier="gap")
    tokens, dim, hidden = 4, 16, 32
    products = (
        tokens * (16 * dim + 4 * dim * dim + 2 * dim * hidden) + 2 * tokens * tokens * dim + dim * 5
    )
    assert count_flops(model, (1, 8, 8)) == 2 * products


def fell(report, name):
    """Whether the first run of a model had an image that fell."""
    (first, *_) = report["models"][name]
    return first["attacks"][-1]["robust"]["count"] < first["clean"]["count"]


def test_demo_writes_everything_it_promises(finished):
    folder, output = finished
    report = json.loads((folder / "report.json").read_text())
    html = (folder / "report.html").read_text()
    # so short a training, after which what falls to two steps depends on the processor
    pictures = {"accuracy.png", "routing_change.png", "expert_load.png"}
    pictures |= {f"examples_{slug(name, '_')}.png" for name in ARCHITECTURES if fell(report, name)}
    assert {p.name for p in folder.glob("*.png")} == pictures
    assert len(list(folder.glob("checkpoints/*.safetensors"))) == 4 and not list(
        folder.glob("**/*.partial")
    )
    assert not list(folder.glob("checkpoints/*.training"))
    assert html.count("data:image/png;base64,") == len(pictures) and not re.search(
        r'(src|href)="(?!data:)', html
    )
    assert report["settings"]["checksum"] in html and len(report["settings"]["checksum"]) == 64
    assert report["versions"]["torch"] == torch.__version__ and report["settings"]["seeds"] == [
        0,
        1,
    ]
    for name in ARCHITECTURES:
        assert name in output and len(report["models"][name]) == 2
        for measured in report["models"][name]:
            assert measured["clean"]["total"] == 40 and [
                a["eps_255"] for a in measured["attacks"]
            ] == [4, 16]
            clean, small, large = measured["clean"], *(a["robust"] for a in measured["attacks"])
            assert clean["value"] >= small["value"] >= large["value"]
            low, high = small["wilson_95"]
            assert low <= small["value"] <= high
    routing = report["models"]["V-MoE"][0]["routing"]
    assert [list(r["layers"]) for r in routing] == [["blocks.2.mlp", "blocks.3.mlp"]] * 2
    for layer in routing[1]["layers"].values():
        assert 0 <= layer["change"] <= 1
        assert abs(sum(layer["load_clean"]) - 1) < 1e-5 and len(layer["load_adversarial"]) == 8
    assert report["models"]["ViT"][0]["routing"] == []
    assert "over 2 seeds" in output and "±" in output and "over 2 seeds" in html


def test_the_same_command_goes_on_and_repeats_nothing(finished, monkeypatch):
    folder, first = finished
    monkeypatch.setattr(demo, "train", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(demo, "measure_robust", lambda *a, **k: pytest.fail("attacked again"))
    monkeypatch.setattr(plots, "draw_all", lambda *arguments: {})  # they take most of the time
    again = run("demo", *TINY, "--seeds", 2, "--out", folder).output
    assert "Going on in" in again
    assert (
        again[again.index("V-MoE and ViT under attack") :]
        == first[first.index("V-MoE and ViT under attack") :]
    )


def test_ctrl_c_and_a_full_disk_keep_what_is_finished(finished, stopped):
    """The numbers are those of the uninterrupted run."""
    for result in stopped.interrupted:
        assert result.exit_code == 130 and "same command goes on" in result.output
    assert stopped.full.exit_code == 1 and stopped.attacks_when_full == 1
    assert "No space left on device" in stopped.full.output
    assert "goes on from there" in stopped.full.output

    folders = stopped.folder, finished[0]
    ours, theirs = (json.loads((f / "report.json").read_text())["models"] for f in folders)
    for name in ARCHITECTURES:
        assert len(ours[name]) == 1
        assert without_times(ours[name][0]) == without_times(theirs[name][0])


def without_times(value):
    if isinstance(value, dict):
        return {
            k: without_times(v)
            for k, v in value.items()
            if "seconds" not in k and "per_second" not in k
        }
    return [without_times(v) for v in value] if isinstance(value, list) else value


def test_one_seed_says_what_it_cannot_show(stopped):
    for text in (stopped.output, (stopped.folder / "report.html").read_text()):
        assert "This is one seed" in text


def test_training_interrupted_between_epochs_ends_with_the_same_weights(tmp_path):
    images, labels = torch.rand(90, 1, 8, 8), torch.arange(90) % 3

    def fresh():
        torch.manual_seed(0)
        return VMoE(**architecture("V-MoE", (1, 8, 8), 3))

    recipe = Recipe(epochs=3, batch_size=40)
    whole = fresh()
    train(whole, images, labels, recipe, seed=1, state_file=tmp_path / "whole")

    def stop(progress):
        if progress.step == 5:  # in the middle of the second epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(fresh(), images, labels, recipe, seed=1, state_file=tmp_path / "parts", on_step=stop)
    resumed, steps = fresh(), []
    torch.rand(17)
    train(
        resumed,
        images,
        labels,
        recipe,
        seed=1,
        state_file=tmp_path / "parts",
        on_step=lambda p: steps.append(p.step),
    )
    assert steps == [4, 5, 6, 7, 8, 9]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )


def test_training_learns(tmp_path):
    """A guard against a recipe that moves nothing: a separable toy set is learnt."""
    labels = torch.arange(400) % 2
    images = (0.25 + 0.5 * labels.view(-1, 1, 1, 1) + 0.1 * torch.randn(400, 1, 8, 8)).clamp(0, 1)
    for name in ARCHITECTURES:
        model = VMoE(**architecture(name, (1, 8, 8), 2))
        train(
            model,
            images,
            labels,
            Recipe(epochs=4, batch_size=40),
            seed=0,
            state_file=tmp_path / name,
        )
        assert (model(images).argmax(1) == labels).float().mean() > 0.97


def test_checkpoints_of_other_kinds_are_named(tmp_path):
    from safetensors.torch import save_file

    def load(path):
        return load_checkpoint(path, torch.device("cpu"))

    arguments = architecture("V-MoE", (1, 8, 8), 3)
    model = VMoE(**arguments).eval()
    good = save_checkpoint(model, arguments, {"name": "V-MoE"})
    (tmp_path / "good").write_bytes(good)
    loaded, extra = load(tmp_path / "good")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(x), model(x)) and extra == {"name": "V-MoE"} and not loaded.training
    (tmp_path / "cut").write_bytes(good[:-100])
    (tmp_path / "text").write_text("no checkpoint")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    (tmp_path / "other").write_bytes(
        save_checkpoint(VMoE(**architecture("ViT", (1, 8, 8), 3)), arguments, {})
    )
    (tmp_path / "unbuildable").write_bytes(save_checkpoint(model, {"wings": 2}, {}))
    for name, message in {
        "cut": "cannot be read", "text": "cannot be read", "foreign": "must have format",
        "other": "weights of another architecture", "unbuildable": "cannot be built",
        "absent": "does not exist",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / name)


def test_output_folder_is_checked_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda *a, **k: pytest.fail("training began"))
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.txt").write_text("mine")
    for out, message in (
        ("file/run", "cannot be written"),
        ("photos", "holds other files and no run"),
    ):
        result = run("demo", *TINY, "--out", tmp_path / out, ok=False)
        assert result.exit_code == 2 and message in result.output.replace("\n", " ")
    assert (tmp_path / "photos" / "holiday.txt").read_text() == "mine"

    def read_only(self, data):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", read_only)
        assert (
            "Read-only file system" in run("demo", *TINY, "--out", tmp_path / "ro", ok=False).output
        )
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000)
    )
    result = run("demo", *TINY, "--out", tmp_path / "full", ok=False)
    assert (
        result.exit_code == 2
        and "needs 100 MB, but only 1 MB are free" in result.output.replace("\n", " ")
    )
    assert not (tmp_path / "full").exists()


def test_a_run_with_other_settings_is_refused(finished):
    result = run("demo", *TINY, "--seeds", 2, "--seed", 7, "--out", finished[0], ok=False)
    assert (
        result.exit_code == 2
        and "holds a run with other settings (seeds" in result.output.replace("\n", " ")
    )
    assert (finished[0] / "report.html").exists()


def test_a_full_disk_leaves_no_probe_behind(tmp_path, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="run cannot be written: No space left on device"):
        RunFolder(tmp_path / "run", {"a": 1}, 0)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_torn_result_is_measured_again(tmp_path):
    folder = RunFolder(tmp_path / "run", {"a": 1}, 0)
    folder.write("x.json", {"value": 1})
    assert folder.read("x.json") == {"value": 1}
    (folder.path / "x.json").write_text('{"value"')
    assert folder.read("x.json") is None
    with pytest.raises(OutputError, match="a: 1 there, 2 now"):
        RunFolder(tmp_path / "run", {"a": 2}, 0)
    nested = {"attacks": {"steps": 40, "eps": [4.0]}, "device": "cpu"}
    RunFolder(tmp_path / "nested", nested, 0)
    with pytest.raises(OutputError, match=r"settings \(attacks.steps: 40 there, 20 now\); choose"):
        RunFolder(
            tmp_path / "nested", {"attacks": {"steps": 20, "eps": (4.0,)}, "device": "cpu"}, 0
        )


def test_a_folder_whose_settings_a_kill_cut_off_is_begun_again(tmp_path):
    (tmp_path / "settings.json.partial").write_text('{"a"')
    folder = RunFolder(tmp_path, {"a": 1}, 0)
    assert not folder.resumed and folder.read("settings.json") == {"a": 1}


def test_two_runs_do_not_share_a_folder(tmp_path):
    with RunFolder(tmp_path / "run", {"a": 1}, 0).held():
        other = RunFolder(tmp_path / "run", {"a": 1}, 0)
        with pytest.raises(OutputError, match="run is in use by another run"), other.held():
            pass
    with other.held():  # the first one has ended
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--norm", "L7"], "--norm must be one of Linf, L2"),
        (["--eps", "a,b"], "--eps must be numbers"),
        (["--eps", "-1"], "--eps must be finite and at least 0"),
        (["--steps", "0"], "'--steps': must be at least 1, got 0"),
        (["--seeds", "0"], "'--seeds': must be at least 1, got 0"),
        (["--image-size", "3000"], "'--image-size': must be from 4 to 1024, got 3000"),
        (["--device", "tpu"], "--device must be auto, cpu or cuda"),
        (["--dtype", "int8"], "--dtype must be float32 or bfloat16"),
        (["--data", "nowhere"], "data must be one of mnist, digits"),
    ],
)
def test_bad_options_are_named(tmp_path, arguments, message):
    result = run("demo", *arguments, "--out", tmp_path / "run", ok=False)
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_a_class_with_one_image_is_refused_before_a_folder_is_made(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((5, 8, 8, 1)), labels=[0, 0, 0, 0, 1])
    arguments = ["--data", tmp_path / "set.npz", *TINY[2:], "--out", tmp_path / "run"]
    result = run("demo", *arguments, ok=False)
    assert result.exit_code == 2 and "must have at least 2 images" in result.output
    assert not (tmp_path / "run").exists()


def test_folder_and_npz_data_go_through_the_demo(tmp_path):
    generator = np.random.default_rng(0)
    np.savez(
        tmp_path / "set.npz", images=generator.random((40, 12, 12, 3)), labels=np.arange(40) % 2
    )
    arguments = ["--data", tmp_path / "set.npz", *TINY[2:]]
    assert (
        "set: 40 images (3, 12, 12), 2 classes"
        in run("demo", *arguments, "--out", tmp_path / "run").output
    )


def test_help_is_there_for_every_command():
    for command in ([], ["demo"], ["attack"], ["doctor"], ["bench"], ["bench", "cpu"]):
        assert "Usage" in run(*command, "--help").output
    assert "Ctrl-C" in run("demo", "--help").output


def test_doctor_passes_and_fails_loudly(monkeypatch):
    from ironmoe.bench.doctor import doctor

    output = run("doctor").output
    assert output.count(" ok ") == len(doctor.SELF_TESTS) and torch.__version__ in output

    def broken():
        raise AssertionError("two and two")

    monkeypatch.setattr(doctor, "SELF_TESTS", {"arithmetic": broken})
    result = run("doctor", ok=False)
    assert result.exit_code == 1 and "FAILED" in result.output and "two and two" in result.output


def test_bench_cpu_compares_equal_layers_only(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "SHAPES", (Shape("tiny", 20, 16, 24, 4, 2),))
    run("bench", "cpu", "--runs", 2, "--out", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(r["dtype"], r["pass"]) for r in rows] == [
        (d, p) for d in ("float32", "bfloat16") for p in ("forward", "forward + dX")
    ]
    assert all(set(r["milliseconds"]) == {"ironmoe", "eager", "grouped_mm", "dense"} for r in rows)
    honest = peers.expert_mlp
    monkeypatch.setattr(
        peers,
        "expert_mlp",
        lambda x, *a, **k: honest(x, *a, **k) * (1.01 if x.dtype == torch.float32 else 1),
    )
    with pytest.raises(RuntimeError, match="outputs disagree"):
        cpu.run_bench_cpu(Console(quiet=True), runs=1, out=tmp_path / "other.json")


def test_radii_are_those_of_the_norm_and_labels_tell_them_apart():
    from ironmoe.bench.common.radii import ascending_radii, exact

    assert ascending_radii(None, "Linf") == (2, 4, 8, 12, 16, 24) and ascending_radii(
        "8,2", "L2"
    ) == (2, 8)
    assert [eps / 255 for eps in ascending_radii(None, "L1")] == [2, 4, 8, 12]
    assert ascending_radii(None, "L2") == (64, 128, 255, 510)
    assert [exact(eps) for eps in (8.0, 0.5, 4.0000001, 1e-05, 1234567.0)] == [
        "8",
        "0.5",
        "4.0000001",
        "1e-05",
        "1234567.0",
    ]


def test_small_data_is_seen_more_often():
    from ironmoe.bench.common.train import default_epochs

    assert [default_epochs(n) for n in (60_000, 4000, 1438, 10)] == [12, 12, 34, 100]
