"""``ironmoe attack``: from names to attacks, from an evaluation to its report, through
interruptions and on two processes."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ironmoe.attacks import FGSM, PGD
from ironmoe.attacks.registry import named_attacks
from ironmoe.bench.__main__ import main
from ironmoe.bench.attack import run as attack_run
from ironmoe.bench.attack.suite import ROUTING, Suite, SuiteError
from ironmoe.bench.cli.app import app
from ironmoe.bench.common import processes

GOLDEN = Path(__file__).parents[2] / "data" / "vmoe_tiny"
SMALL = ["--all", "--attack-images", 36, "--device", "cpu", "--steps", 4]
SEARCHED = "pgd,fgsm,mifgsm"


def attack(*arguments, code=0):
    result = CliRunner().invoke(app, ["attack", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join(result.output.split())


def attack_linear(*arguments, code=0):
    return attack(
        "--model", "small_models:linear", "--data", "set.npz", *SMALL, *arguments, code=code
    )


def written(folder):
    """(report.json, report.html, images.npz)."""
    with np.load(folder / "images.npz") as file:
        return (
            json.loads((folder / "report.json").read_text()),
            (folder / "report.html").read_text(),
            dict(file),
        )


def same_verdicts(one, other):
    assert one.keys() == other.keys()
    costs = ("forwards", "backwards")  # an interrupted run pays for some passes again
    keys = [key for key in one if key.rpartition("/")[2] not in costs]
    return all(
        np.array_equal(one[key], other[key], equal_nan=one[key].dtype.kind == "f") for key in keys
    )


def test_it_writes_what_it_promises(place):
    output = attack_linear("--attack", SEARCHED, "--eps", "8,2,32", "--out", "run")
    report, html, images = written(place / "run")
    assert report["eps_255"] == [2, 8, 32] and list(report["report"]["attacks"]) == SEARCHED.split(
        ","
    )
    assert report["report"]["clean"] == {**report["report"]["clean"], "count": 30, "total": 36}
    worst = [share["count"] for share in report["worst_case"]]
    assert 30 >= worst[0] >= worst[1] >= worst[2] and worst[2] < 30
    at = np.stack([255 * images[f"{name}/eps"] for name in SEARCHED.split(",")])
    fell_at = np.where(np.isnan(at), np.inf, at)
    assert worst == [
        int(((fell_at > eps).all(0) & images["clean_correct"]).sum()) for eps in (2.01, 8.01, 32.01)
    ]
    for name in SEARCHED.split(","):
        fell = images[f"{name}/fell"]
        assert int(fell.sum()) == report["report"]["attacks"][name]["confirmed"] > 0
        assert (images[f"{name}/distance"][fell] <= images[f"{name}/eps"][fell]).all()
        assert html.count(f">{name}</td>") >= 3 and name in output
    assert "worst case" in html and "upper bound" in html and "upper bound" in output
    assert {p.name for p in (place / "run").glob("*.png")} == {
        "robust_accuracy.png", "distances.png", "steps.png", "easiest.png", "hardest.png"
    }  # fmt: skip
    assert html.count("data:image/png;base64,") == 5 and not re.search(
        r'(src|href)="(?!data:)', html
    )
    assert (
        set(report["costs"]) == set(report["report"]["attacks"])
        and report["costs"]["pgd"]["images_per_second"] > 0
    )
    made = {"steps": 4, "restarts": 2, "targets": 0, "eot": 1, "questions": 4}
    assert (
        report["parts"]["pgd"] == [{"name": "pgd"} | made]
        and "pgd (steps 4, restarts 2), fgsm (steps 1" in output
    )
    with np.load("set.npz") as data:
        assert images["index"].tolist() == list(range(36))
        rows = images["row"].tolist()
        assert rows == sorted(set(rows)) and rows[-1] >= 36  # a sample of all, not the first ones
        assert np.array_equal(images["label"], data["labels"][rows])
    assert (
        report["versions"]["torch"] == torch.__version__ and report["settings"]["checksum"] in html
    )
    tripped = [
        flag.group(1) for flag in re.finditer(r">(<b>tripped</b>|not looked at|passed)</td>", html)
    ]
    assert len(tripped) == len(report["report"]["checks"]) > 5 and tripped == sorted(tripped)


def test_one_attack_in_another_norm_without_checks(place, no_pictures):
    attack_linear("--norm", "L2", "--eps", "20", "--alpha", "5", "--no-checks", "--out", "l2")
    report, html, _ = written(place / "l2")
    assert (
        report["report"]["checks"] == []
        and "Not run (--no-checks)" in html
        and "under attack in L2" in html
        and "alpha 5/255)" in html
    )
    assert "worst case" not in html and "L2, in 1/255 of the pixel range" in html


def test_a_budget_counts_what_is_undecided_and_the_same_command_goes_on(place, no_pictures):
    common = ["--attack", SEARCHED, "--eps", "2,8", "--batch-size", 40]
    attack_linear(*common, "--out", "whole")
    output = attack_linear(*common, "--out", "parts", "--max-forwards", 150)
    report, html, images = written(place / "parts")
    undecided = sum(int((~images[f"{name}/decided"]).sum()) for name in SEARCHED.split(","))
    assert undecided and not report["report"]["complete"]
    assert (
        f"{undecided} of 108 (image, attack) pairs are undecided" in output
        and f"{undecided} of 108" in html
    )
    assert " to " in html and "a budget ended this early" in output
    open_ = report["worst_case"][-1]
    assert (
        open_["undecided"]
        and open_["value"] is None
        and open_["wilson_95"][0] <= open_["least"] < open_["most"] < open_["wilson_95"][1]
    )
    assert "Going on in parts/" in attack_linear(*common, "--out", "parts")
    report, html, images = written(place / "parts")
    assert report["report"]["complete"] and "undecided and count" not in html
    assert same_verdicts(images, written(place / "whole")[2])


def test_interrupted_it_goes_on_and_repeats_nothing(place, no_pictures, monkeypatch):
    common = ["--attack", SEARCHED, "--eps", "2,8", "--batch-size", 8]
    attack_linear(*common, "--out", "whole")
    real, decided = attack_run.evaluate, []

    def watched(stop_at):
        def evaluate(*args, on_progress, **options):
            def note(progress):
                on_progress(progress)
                if decided[-1:] != [progress.decided]:  # it also tells while none is decided
                    decided.append(progress.decided)
                if progress.decided >= stop_at:
                    raise KeyboardInterrupt

            return real(*args, on_progress=note, **options)

        return evaluate

    monkeypatch.setattr(attack_run, "evaluate", watched(50))
    assert "same command goes on" in attack_linear(*common, "--out", "parts", code=130)
    first, seconds = (
        len(decided),
        json.loads((place / "parts" / "results" / "seconds.json").read_text())["seconds"],
    )
    monkeypatch.setattr(attack_run, "evaluate", watched(math.inf))
    attack_linear(*common, "--out", "parts")
    assert len(decided) <= 108 and 0 < first < len(decided)  # each pair is decided once
    report, _, images = written(place / "parts")
    assert report["seconds"] > seconds > 0
    assert same_verdicts(images, written(place / "whole")[2])
    decided.clear()
    attack_linear(*common, "--out", "parts")
    assert not decided and same_verdicts(written(place / "parts")[2], images)
    assert written(place / "parts")[0]["seconds"] == report["seconds"]  # nothing was left to attack
    assert written(place / "parts")[0]["costs"] == report["costs"]


TWO_RUNS = """
import os, sys
from ironmoe.attacks.registry import named_attacks
from ironmoe.bench.__main__ import main

port, *common = sys.argv[1:]
sys.argv = ["ironmoe", "attack", *common, "--eps", "2,8"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}  # to meet anew
sys.argv[-1] = "3"
main()
"""


def test_two_processes_find_what_one_finds(place, no_pictures):
    """Under torchrun; each takes half, the first reports. Another run into the same folder is
    refused.

    Most of the time goes into imports, so each process makes both runs.
    """
    common = ["--model", "small_models:linear", "--data", "set.npz", *SMALL, "--attack", SEARCHED]
    common += ["--save-images", "npz"]
    attack(*common, "--eps", "2,8", "--out", "one")
    (place / "two_runs.py").write_text(TWO_RUNS)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
    ]
    command = map(str, [*launcher, "two_runs.py", port, *common, "--out", "two"])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command], capture_output=True, text=True, timeout=1000, env=environment
    )

    assert "Traceback" not in result.stderr.partition("holds a run")[0], result.stderr
    assert result.stdout.count("Report: two/report.html") == 1
    one, two = written(place / "one"), written(place / "two")
    assert two[0]["processes"] == 2 and "2 processes" in two[1]
    assert same_verdicts(one[2], two[2])
    for name in ("images.csv", "table.csv", "adversarial/index.csv", "adversarial/pgd.npz"):
        assert (place / "one" / name).read_bytes() == (place / "two" / name).read_bytes()
    assert "easiest.png" in {p.name for p in (place / "two").glob("*.png")}
    assert len(list((place / "two" / "results" / "journal").glob("journal-*.jsonl"))) == 2
    assert result.returncode and "[rank" not in result.stderr
    # at once, and at the end of what torchrun adds
    said = "ironmoe: output folder two holds a run with other settings"
    assert result.stderr.count(f"\n{said}") + result.stderr.startswith(said) == 1
    assert f"traceback : {said}" in result.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_what_every_process_finds_wrong_is_said_once(place, rank, monkeypatch, capsys):
    """A wrong argument is found before processes join, so each can be run alone, as torchrun would
    start it."""
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(
        sys, "argv", ["ironmoe", "attack", "--model", "small_models:linear", "--steps", "-1"]
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as exit_of:
        main()
    printed = capsys.readouterr()
    assert exit_of.value.code == 2 and printed.out == ""
    assert printed.err.count("at least 1, got -1") == 1 if rank == 0 else printed.err == ""


def test_a_model_with_experts_shows_its_routing(moe, tmp_path):
    common = [
        "--data",
        "digits",
        "--attack-images",
        20,
        "--device",
        "cpu",
        "--steps",
        2,
        "--restarts",
        1,
        "--eps",
        "8,64",
    ]
    output = attack(
        moe, *common, "--routing", "frozen", "--dtype", "bfloat16", "--out", tmp_path / "run"
    )
    report, html, _ = written(tmp_path / "run")
    assert [list(at["layers"]) for at in report["routing"]] == [
        ["blocks.1.mlp"]
    ] * 2 and "Expert load" in html
    assert (tmp_path / "run" / "routing_change.png").exists() and (
        tmp_path / "run" / "expert_load.png"
    ).exists()
    assert (
        "search in bfloat16, search with routing frozen" in output
        and report["settings"]["attacks"]["routing"] == "frozen"
    )


def test_images_that_influence_each_other_are_attacked_in_groups(place):
    pytest.importorskip("msgpack")
    generator = np.random.default_rng(0)
    np.savez(
        "photos.npz",
        images=generator.random((12, 3, 16, 16), dtype=np.float32),
        labels=np.arange(12) % 10,
    )
    model = f"vmoe:{GOLDEN}?top_k=2&capacity=1.05&images_per_group=4"
    common = [
        "--model",
        model,
        "--data",
        "photos.npz",
        "--all",
        "--device",
        "cpu",
        "--eps",
        "8",
        "--out",
        "run",
    ]
    assert "influence each other" in attack(*common, "--attack", "square", code=2)
    assert not (place / "run" / "report.json").exists()


def test_where_a_checkpoint_lies_does_not_matter(moe, tmp_path, no_pictures, monkeypatch):
    common = [
        "--data",
        "digits",
        "--attack-images",
        3,
        "--device",
        "cpu",
        "--steps",
        1,
        "--eps",
        "8",
        "--no-checks",
    ]
    attack(moe, *common, "--out", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert "Going on in" in attack("moe.safetensors", *common, "--out", tmp_path / "run")


def test_radii_that_agree_to_six_digits_are_two(moe, tmp_path, no_pictures):
    common = [
        "--data",
        "digits",
        "--attack-images",
        60,
        "--device",
        "cpu",
        "--steps",
        1,
        "--no-checks",
    ]
    output = attack(moe, *common, "--eps", "4.0000001,4.0000002", "--out", tmp_path / "[b]run")
    assert "4.0000001" in output and "4.0000002" in output and "[b]run/report.html" in output
    files = {file.name for file in (tmp_path / "[b]run" / "results").glob("routing*")}
    assert files == {"routing4.0000001.json", "routing4.0000002.json"}


def test_options_reach_the_attacks_that_take_them():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
    suite = Suite(
        ("pgd", "fgsm", "apgd-t", "square"),
        "L2",
        (8, 16),
        steps=7,
        queries=9,
        restarts=3,
        alpha_255=2,
        eot=2,
        seed=5,
        dtype="float16",
    )
    made = suite.make(model)
    assert isinstance(made["pgd"], PGD) and isinstance(made["fgsm"], FGSM)
    assert [made[name].steps for name in suite.names] == [7, 1, 7, 9] and [
        made[n].restarts for n in suite.names
    ] == [
        3,
        1,
        3,
        3,
    ]
    assert made["pgd"].alpha == 2 / 255 and made["apgd-t"].targets == 9
    for each in made.values():
        assert (each.eps, each.norm, each.seed, each.eot) == (
            16 / 255,
            "L2",
            5,
            2,
        ) and each.attacked_model.attack_dtype == torch.float16
    assert (
        suite.pgd_steps == 7
        and Suite(("square",), queries=7).pgd_steps == Suite().make(model)["pgd"].steps == 40
    )


def test_an_option_that_some_attacks_do_not_take_is_said():
    suite = Suite(("pgd", "square", "autoattack"), steps=7, restarts=3, alpha_255=2.5)
    assert suite.notes == [
        "--steps 7 is for pgd; square and autoattack run without it.",
        "--restarts 3 is for pgd and square; autoattack runs without it.",
        "--alpha 2.5 is for pgd; square and autoattack run without it.",
    ]
    assert Suite(("pgd",), steps=7, restarts=3).notes == Suite(("pgd", "fgsm")).notes == []
    assert "queries" not in Suite().settings and Suite(queries=5).settings["queries"] == 5


def test_every_name_makes_an_attack_and_every_routing_mode_a_mode(moe):
    from ironmoe.bench.common.checkpoints import load_checkpoint

    model, _ = load_checkpoint(moe, torch.device("cpu"))
    made = Suite(tuple(named_attacks()), "L2").make(model)
    assert (
        list(made) == list(named_attacks())
        and made["autoattack-rand"].eot == 20
        and made["autoattack"].eot == 1
    )
    assert [attack.name for attack in made["autoattack"].stages] == [
        "apgd-ce",
        "apgd-t",
        "fab-t",
        "square",
    ]
    modes = {
        mode: Suite(routing=mode).make(model)["pgd"].attacked_model.routing for mode in ROUTING
    }
    assert len({type(mode) for mode in modes.values()}) == len(modes) == 7
    with pytest.raises(SuiteError, match="needs a model with experts"):
        Suite(routing="frozen").make(torch.nn.Linear(2, 2))


def test_a_later_call_with_fewer_checks_keeps_those_that_were_made(place, no_pictures):
    def checks():
        return {flag["name"]: flag for flag in written(place / "run")[0]["report"]["checks"]}

    common = ["--attack", "pgd", "--eps", "8", "--out", "run"]
    attack_linear(*common)
    made = checks()
    assert len(made) > 10
    for options in (["--no-checks"], ["--max-forwards", 1], []):
        attack_linear(*common, *options)
        assert checks() == made, options


def test_it_says_how_many_images_of_how_many_are_attacked(place, no_pictures):
    common = ["--model", "small_models:linear", "--data", "set.npz", "--device", "cpu",
              "--steps", 1, "--no-checks", "--eps", 8]  # fmt: skip
    said = attack(*common, "--out", "split")
    assert (
        "Attacking 8 of 40 images (the test split, a fifth of each class; --all for all)." in said
    )
    said = attack(*common, "--attack-images", 3, "--out", "few")
    assert (
        "Attacking 3 of 40 images (of the test split of 8; --attack-images for more, --all for "
        "all)." in said
    )


def test_it_says_that_the_split_is_its_own_for_models_that_it_did_not_train(
    place, moe, no_pictures
):
    common = ["--device", "cpu", "--attack", "fgsm", "--no-checks", "--eps", 8]
    own = "own. If the model was trained on other parts of these images, it has seen most of the"
    elsewhere = ["--model", "small_models:linear", "--data", "set.npz"]
    assert own in attack(*elsewhere, *common, "--out", "split")
    assert own in written(Path("split"))[1]  # the report says so, too
    assert own not in attack(*elsewhere, *common, "--all", "--out", "all")
    digits = ["--data", "digits", "--attack-images", 4]
    assert own not in attack(moe, *digits, *common, "--out", "trained")
    example = ["--model", "ironmoe.moe.example:trained_model"]
    assert own not in attack(*example, *digits, *common, "--out", "example")
