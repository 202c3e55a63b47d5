"""``ironmoe compare`` and ``ironmoe table``, on runs of ``ironmoe attack`` on a small model."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ironmoe.attacks import PGD, compare, evaluate
from ironmoe.bench.attack import report as evaluation_report
from ironmoe.bench.cli.app import app

PROGRAM = """
import torch

def linear(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))

def more_biased():
    model = linear()
    with torch.no_grad():
        model[1].bias += torch.tensor([0.3, 0.0, 0.0, 0.0])
    return model
"""
EPS = (2, 8, 32)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with runs of two models."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr(evaluation_report, "draw_evaluation", lambda outcome: {})
        (folder / "two_models.py").write_text(PROGRAM)
        namespace = {}
        exec(PROGRAM, namespace)
        images = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        labels = namespace["linear"]()(images).argmax(1)
        labels[::7] = (labels[::7] + 1) % 4
        np.savez("set.npz", images=images, labels=labels)
        np.savez("mirrored.npz", images=images.flip(3), labels=labels)

        eps = ",".join(map(str, EPS))
        pgd = ["--attack", "pgd", "--steps", 4, "--restarts", 1, "--eps", eps]
        runs = {
            "one": ["linear", "set.npz", *pgd],
            "other": ["more_biased", "set.npz", *pgd],
            "steps": ["linear", "set.npz", "--attack", "pgd,fgsm", "--steps", 2, "--eps", "8"],
            "stopped": ["linear", "set.npz", *pgd, "--max-forwards", 150],
            "few": ["linear", "set.npz", *pgd, "--attack-images", 30],
            "mirror": ["linear", "mirrored.npz", *pgd],
            "l2": ["linear", "set.npz", "--norm", "L2", "--steps", 2, "--eps", "8"],
        }
        for name, (model, data, *options) in runs.items():
            common = ["--all", "--device", "cpu", "--no-checks", "--out", name]
            run("attack", "--model", f"two_models:{model}", "--data", data, *common, *options)
        yield folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def test_it_says_what_compare_says_of_the_two_models():
    namespace = {}
    exec(PROGRAM, namespace)
    with np.load("set.npz") as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    reports = []
    for make in ("linear", "more_biased"):
        model = namespace[make]()
        attacks = {"pgd": PGD(model, steps=4)}
        radii = [eps / 255 for eps in EPS]
        reports.append(evaluate(model, (images, labels), attacks, eps=radii, checks=False))
    expected = compare(*reports).as_dict()

    found = json.loads(run("compare", "one", "other", "--json"))
    assert found["lines"] == expected["lines"] and found["notes"] == []
    assert found["one"]["model"] == "linear"
    assert found["other_settings"] == []
    assert any(line["difference"] for line in found["lines"])


def test_the_table_shows_every_line():
    output = run("compare", "one", "other")
    lines = json.loads(run("compare", "one", "other", "--json"))["lines"]
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.splitlines()
        if line.startswith("│")
    ]
    assert [row[:2] for row in cells] == [["clean", ""], *(["pgd", str(eps)] for eps in EPS)]
    for row, line in zip(cells, lines, strict=True):
        shares = [f"{100 * line[f'accuracy_{run}']:.1f}" for run in ("one", "other")]
        assert row[2:4] == shares and row[4].startswith(f"{100 * line['difference']:+.1f} [")
    assert "On 40 images" in output and "McNemar's exact test" in output
    assert "undecided" not in output and "differ in more" not in output


def test_exchanged_runs_give_opposite_differences_and_a_run_equals_itself():
    forth, back, same = (
        json.loads(run("compare", *runs, "--json"))["lines"]
        for runs in (("one", "other"), ("other", "one"), ("one", "one"))
    )
    for line, opposite in zip(forth, back, strict=True):
        assert line["difference"] == -opposite["difference"]
        assert line["p_value"] == opposite["p_value"]
    assert {(line["difference"], line["p_value"]) for line in same} == {(0, 1)}


def test_what_differs_beside_the_model_is_said():
    output = run("compare", "one", "steps")
    assert "attacks.steps: 4 and 2" in output
    assert "Only the second run has fgsm." in output


def test_a_stopped_run_shows_what_is_undecided():
    output = run("compare", "one", "stopped")
    assert "undecided" in output and "may still fall" in output


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("few", "must be about the same images, got 40 and 30"),
        ("mirror", "must be about the same images, got image 0 with checksum"),
        ("l2", "must be attacked in the same norm, got Linf and L2"),
        ("nowhere", "must be the folder of a run of ironmoe attack"),
    ],
)
def test_runs_that_are_no_pair_are_refused(other, message):
    assert message in " ".join(run("compare", "one", other, code=2).split())


def test_folders_without_results_say_what_to_do(place, tmp_path):
    shutil.copytree(place / "one", tmp_path / "begun")
    (tmp_path / "begun" / "images.jsonl").unlink()
    message = "the same command again writes them"
    assert message in " ".join(run("compare", "one", tmp_path / "begun", code=2).split())
    (tmp_path / "begun" / "report.json").unlink()
    assert "without a report" in " ".join(run("compare", "one", tmp_path / "begun", code=2).split())
    (tmp_path / "begun" / "report.json").write_text('{"title": "a demo"}')
    assert "of another command" in " ".join(run("table", tmp_path / "begun", code=2).split())

    (tmp_path / "begun" / "attack").mkdir()
    (tmp_path / "begun" / "attack" / "report.json").write_text("{}")
    output = "".join(run("table", tmp_path / "begun", code=2).split())
    assert f"take{tmp_path / 'begun' / 'attack'}" in output  # where ironmoe train has its attack


def test_a_confidence_is_between_0_and_1():
    assert "between 0 and 1, got 95" in run("compare", "one", "other", "--confidence", 95, code=2)


def test_a_table_of_several_runs_has_a_block_for_each(place):
    latex = run("table", "one", "other")
    models = [line.split(" & ")[0] for line in latex.splitlines() if " & pgd & " in line]
    assert models == ["linear", "more\\_biased"]
    assert latex.count("\\midrule") == 2 and latex.endswith("\\end{tabular}\n")

    table = list(csv.DictReader(io.StringIO(run("table", "one", "stopped", "--format", "csv"))))
    assert list(dict.fromkeys(row["model"] for row in table)) == [
        "linear (one)", "linear (stopped)"
    ]  # fmt: skip
    own = list(csv.DictReader(io.StringIO((place / "one" / "table.csv").read_text())))
    assert [row | {"model": "linear"} for row in table[: len(own)]] == own


def test_another_format_is_refused():
    message = "--format must be latex or csv, got 'html'"
    assert message in run("table", "one", "--format", "html", code=2)
