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

class Breaking(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = linear()

    def forward(self, images):
        dark = images.flatten(1)[:, :1] < 0.1
        return torch.where(dark, float("nan"), self.inner(images))
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
            "breaking": ["Breaking", "set.npz", *pgd, "--on-bad", "skip"],
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
    assert (
        found["lines"] == expected["lines"]
        and found["notes"] == []
        and len(found["sentences"]) == 1 + len(EPS)
    )
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
    assert [row[:2] for row in cells] == [["clean", ""], *(["PGD", f"{eps}/255"] for eps in EPS)]
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
    output = " ".join(output.split())
    assert "steps: 4 and 2" in output and "pgd questions" in output
    assert "eps/255: 2.0, 8.0, 32.0 and 8.0" in output
    assert "Only the second run has fgsm." in output
    assert "Only the first run has pgd at 2/255, 32/255." in output
    assert "Both runs are of the same model, with the same weights." in output


def test_a_stopped_run_shows_what_is_undecided():
    output = run("compare", "one", "stopped")
    assert "undecided" in output and "from where all undecided images fall" in output
    assert "The second run is unfinished: " in output
    lines = json.loads(run("compare", "one", "stopped", "--json"))["lines"]
    open_ = [line for line in lines if line["undecided_other"]]
    assert open_ and all(line["accuracy_other"] is line["difference"] is None for line in open_)
    assert all(line["least_other"] < line["most_other"] for line in open_)
    assert all(line["least_one"] == line["accuracy_one"] for line in open_)


def test_it_says_in_a_sentence_which_model_is_better():
    output = " ".join(run("compare", "one", "other").split())
    (line, *_) = json.loads(run("compare", "one", "other", "--json"))["lines"][-1:]
    assert "Under PGD at 32/255 (Linf) " in output and "0.125" not in output
    low, high = (100 * end for end in line["interval"])
    if low <= 0 <= high or line["p_value"] >= 0.05:
        assert f"({'95'} % interval of the difference {low:+.1f} to {high:+.1f} points" in output
    else:
        better = ("linear", "more_biased")[line["difference"] < 0]
        assert f"(Linf) {better} is better than" in output


def test_a_run_beside_itself_is_said():
    assert "Both are the same run, one: every difference is 0." in run("compare", "one", "one")
    notes = json.loads(run("compare", "one", "one", "--json"))["notes"]
    assert notes[0].startswith("Both are the same run") and "Ranges" not in notes[0]
    assert "Ranges say only that its undecided images may" in run("compare", "stopped", "stopped")


def test_checks_of_both_runs_are_said():
    output = " ".join(run("compare", "one", "other").split())
    assert output.count("checks against false security were not made") == 2


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

    table = list(csv.DictReader(io.StringIO(run("table", "one", "other", "--format", "csv"))))
    assert list(dict.fromkeys(row["model"] for row in table)) == ["linear", "more_biased"]
    own = list(csv.DictReader(io.StringIO((place / "one" / "table.csv").read_text())))
    assert [{key: row[key] for key in own[0]} for row in table[: len(own)]] == own
    assert {(row["norm"], row["data"], row["complete"]) for row in table} == {
        ("Linf", "set", "true")
    }
    assert [float(row["eps_255"]) for row in table if row["eps_255"]] == 2 * [*EPS]


def test_a_table_names_norm_data_and_number_of_images():
    latex = run("table", "one", "other")
    assert latex.startswith("% Linf, set, 40 images\n% needs")
    assert "Model & Data & Norm & Attack & $n$ & Clean & " in latex
    assert "linear & set & Linf & pgd & 40 & " in latex
    markdown = run("table", "one", "other", "--format", "md")
    assert markdown.startswith("| Model | Data | Norm | Attack | n | Clean | 2/255 | 8/255 | ")
    assert "\nLinf, set, 40 images.\n" in markdown


@pytest.mark.parametrize("other", ["l2", "mirror", "few"])
def test_norms_data_and_image_subsets_are_not_mixed_in_a_table(other):
    assert run("table", "one", "other").count("\\begin{tabular}") == 1
    latex = run("table", "one", other)
    assert latex.count("\\begin{tabular}") == 2
    rows = list(csv.DictReader(io.StringIO(run("table", "one", other, "--format", "csv"))))
    assert len({(row["norm"], row["data"], row["image_set"]) for row in rows}) == 2


def test_attacks_of_another_strength_are_named_by_what_differs():
    latex = run("table", "one", "steps")
    assert "pgd (steps 4, restarts 1, questions " in latex
    assert "pgd (steps 2, restarts " in latex
    assert "% pgd is not the same attack in all runs: steps" in latex
    assert "worst case of pgd, fgsm" in latex and "The runs have other radii" in latex


def test_an_unfinished_run_is_marked_in_a_table():
    latex = run("table", "other", "stopped")
    assert "linear (unfinished) & " in latex and "% linear is unfinished: " in latex
    assert " to " in latex.partition("linear (unfinished)")[2]
    assert "true" in run("table", "other", "--format", "csv")


def driven_in(run_folder):
    """(numbers in report.json, images driven to NaN, images NaN from the start)."""
    numbers = json.loads((run_folder / "report.json").read_text())["report"]
    driven = len(numbers["skipped_under_attack"])
    assert 0 < driven < len(numbers["skipped"])
    return numbers, driven, len(numbers["skipped"]) - driven


def test_images_that_an_attack_drove_to_nan_stand_in_every_table(place):
    numbers, driven, start = driven_in(place / "breaking")
    shares = [f"{100 * each['value']:.1f}" for each in numbers["if_skipped_fell"]]
    kept = 40 - start
    said = f"Breaking: {driven + start} of 40 images are left out, {start} as unreadable or not"
    markdown = run("table", "breaking", "--format", "md")
    assert said in markdown
    held = ", ".join(f"{share} % at {eps}/255" for share, eps in zip(shares, EPS, strict=True))
    assert f" of {kept} images are right without an attack, and {held} under pgd.\n" in markdown
    for latex in (run("table", "breaking"), (place / "breaking" / "table.tex").read_text()):
        assert held.replace("%", "\\%") in latex

    lines = run("table", "breaking", "--format", "csv").splitlines()  # and standard error
    notes = [line for line in lines if line.startswith("Linf, set")]
    assert said in notes[0] and held in notes[1]
    rows = list(csv.DictReader(line for line in lines if line not in notes))
    own = list(csv.DictReader(io.StringIO((place / "breaking" / "table.csv").read_text())))
    for row in (*rows, *own):
        assert (row["skipped"], row["skipped_under_attack"]) == (str(driven + start), str(driven))
    fallen = [each["value"] for each in numbers["if_skipped_fell"]]
    assert [float(row["least_if_skipped_fell"]) for row in own[1:]] == pytest.approx(fallen)

    images = list(csv.DictReader(io.StringIO((place / "breaking" / "images.csv").read_text())))
    assert sum(row["skipped_under_attack"] == "true" for row in images) == driven
    with np.load(place / "breaking" / "images.npz") as arrays:
        assert int(arrays["pgd/skipped_under_attack"].sum()) == driven


def test_a_model_that_breaks_compares_no_better_for_it(place):
    numbers, driven, start = driven_in(place / "breaking")
    found = json.loads(run("compare", "breaking", "one", "--json"))
    for line, each in zip(found["lines"][1:], numbers["if_skipped_fell"], strict=True):
        assert line["images"] == 40 - start and line["least_one"] == pytest.approx(each["value"])
        assert line["accuracy_one"] is None and line["least_one"] < line["most_one"]
    output = " ".join(run("compare", "breaking", "one").split())
    assert f"Images that an attack of the first run drove to NaN: {driven}." in output
    assert f"Images left out, because one run skipped them: {start}." in output


def test_a_run_of_an_earlier_version_that_skipped_images_is_refused(place, tmp_path):
    shutil.copytree(place / "breaking", tmp_path / "old")
    images = tmp_path / "old" / "images.jsonl"
    rows = [json.loads(line) for line in images.read_text().splitlines()]
    known = [{k: v for k, v in row.items() if k != "skipped_under_attack"} for row in rows]
    images.write_text("".join(json.dumps(row) + "\n" for row in known))
    said = " ".join(run("compare", tmp_path / "old", "one", code=2).split())
    assert "the same command again writes it" in said

    table = tmp_path / "old" / "table.csv"
    shutil.copytree(place / "one", tmp_path / "older")
    older = tmp_path / "older" / "table.csv"
    kept = csv.DictReader(io.StringIO(older.read_text()))
    names = [name for name in kept.fieldnames if "skipped" not in name]
    older.write_text(
        "".join(
            f"{','.join(row[name] for name in names)}\n"
            for row in ({name: name for name in names}, *kept)
        )
    )
    both = csv.DictReader(io.StringIO(run("table", "other", older.parent, "--format", "csv")))
    assert {(row["skipped"], row["norm"], row["data"]) for row in both} == {("0", "Linf", "set")}

    table.write_text(table.read_text().replace("skipped_under_attack", "other"))
    said = " ".join(run("table", tmp_path / "old", code=2).split())
    assert "a table without 'skipped_under_attack'" in said


def test_one_folder_is_given_once_to_a_table():
    assert "got one folder twice" in run("table", "one", "one/../one", code=2)


def test_another_format_is_refused():
    message = "--format must be latex, csv, md, got 'html'"
    assert message in run("table", "one", "--format", "html", code=2)
