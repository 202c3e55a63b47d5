"""``ironmoe runs``: runs of every kind, unfinished ones, and what is no run."""

import csv
import io
import json

import pytest
from typer.testing import CliRunner

from ironmoe.bench.cli.app import app
from ironmoe.bench.listing.kinds import KINDS
from ironmoe.bench.listing.listing import runs_in

PGD = ["--attack", "pgd,fgsm", "--eps", "2,8", "--device", "cpu", "--all", "--no-checks"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "60"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def written(folder, **files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def runs(place, no_pictures):
    """A finished and a stopped attack, beside small settings and reports of the other kinds."""
    model = ["--model", "small_models:linear", "--data", "set.npz"]
    run("attack", *model, *PGD, "--out", "runs/whole")
    run("attack", *model, *PGD, "--max-forwards", 60, "--batch-size", 8, "--out", "runs/stopped")
    report = json.loads((place / "runs/whole/report.json").read_text())
    settings = json.loads((place / "runs/whole/settings.json").read_text())
    journal = (place / "runs/whole/results/journal/journal-0.jsonl").read_bytes().splitlines(True)
    killed = written(place / "runs/killed", settings=settings) / "results" / "journal"
    killed.mkdir(parents=True)
    (killed / "journal-0.jsonl").write_bytes(b"".join(journal[:4]) + journal[4][:20])

    recipe = {"recipe": {"epochs": 1}, "data": "mnist"}
    method = {"name": "trades", "norm": "Linf", "eps_255": 8}
    shares = {"clean": report["report"]["clean"], "worst_case": report["worst_case"][:1]}
    shares |= {"at_chance": True}
    made = {"made": {"date": "2001-02-03T04:05:06+00:00"}}
    trained = {"settings": {**recipe, "method": method}, "report": made | {"attack": shares}}
    written(place / "runs/training", **trained)
    demo = {**recipe, "seeds": [0], "attack": {"norm": "L2", "eps_255": [64]}}
    shown = made | {"verdict": ["So it is."], "models": {"a": []}}
    written(place / "runs/show", settings=demo, report=shown)
    study = {"data": "digits", "training": {}, "models": []}
    written(place / "runs/deep/study", settings=study, report=made | {"runs": [1, 2]})
    written(place / "runs/bench", rows={"benchmark": "bench cpu", "rows": [{}], **made})
    return place / "runs"


def test_every_kind_of_run_is_listed_by_date(runs):
    rows = runs_in(runs)
    assert {row["kind"] for row in rows} == {*KINDS}
    assert [row["date"] for row in rows] == sorted(row["date"] for row in rows)
    by = {row["path"].rpartition("/")[2]: row for row in rows}
    assert (by["whole"]["model"], by["whole"]["data"]) == ("linear", "set")
    assert (by["whole"]["norm"], by["whole"]["eps_255"]) == ("Linf", [2, 8])
    assert by["training"]["verdict"].endswith("; the clean accuracy is not told from chance")
    assert by["training"]["eps_255"] == [8] and by["show"]["norm"] == "L2"
    assert by["show"]["verdict"] == "So it is." and by["study"]["verdict"] == "2 models measured"
    assert by["bench"]["state"] == "1 row" and by["bench"]["complete"] is None


def test_a_run_says_what_came_out_and_how_far_it_is(runs):
    by = {row["path"].rpartition("/")[2]: row for row in runs_in(runs)}
    report = json.loads((runs / "whole" / "report.json").read_text())
    last = report["worst_case"][-1]
    assert by["whole"]["complete"] is True and by["whole"]["state"] == "complete"
    assert by["whole"]["verdict"].endswith(f"{100 * last['value']:.1f} % at 8/255")
    assert by["stopped"]["complete"] is False and "undecided" in by["stopped"]["state"]
    assert " to " in by["stopped"]["verdict"]
    assert by["killed"]["complete"] is False and by["killed"]["verdict"] is None
    decided = int(by["killed"]["state"].split()[1])
    assert 0 < decided < 80 and "(image, attack) pairs decided" in by["killed"]["state"]


BREAKING = """

class Breaking(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = linear()

    def forward(self, images):
        dark = images.flatten(1)[:, :1] < 0.1
        return torch.where(dark, float("nan"), self.inner(images))

def flat():
    model = linear()
    torch.nn.init.zeros_(model[1].weight)
    return model
"""


def test_images_that_an_attack_drove_to_nan_and_chance_are_said(place, no_pictures):
    with (place / "small_models.py").open("a") as file:
        file.write(BREAKING)
    data = ["--data", "set.npz", *PGD, "--on-bad", "skip"]
    run("attack", "--model", "small_models:Breaking", *data, "--out", "runs/breaking")
    run("attack", "--model", "small_models:flat", *data, "--out", "runs/flat")
    breaking, flat = sorted(runs_in(place / "runs"), key=lambda row: row["path"])

    numbers = json.loads((place / "runs/breaking/report.json").read_text())["report"]
    driven = len(numbers["skipped_under_attack"])
    start = len(numbers["skipped"]) - driven
    assert driven > 1 <= start
    two, eight = (f"{100 * each['value']:.1f} %" for each in numbers["if_skipped_fell"])
    assert breaking["verdict"].endswith(
        f"; {start} image{'s' * (start > 1)} skipped without any attack; {driven} images skipped "
        f"under attack alone, which makes it {two} at 2/255, {eight} at 8/255 if they count as "
        "fallen"
    )
    assert flat["verdict"].endswith("; the clean accuracy is not told from chance")
    assert "chance" not in breaking["verdict"]


def test_a_run_that_never_began_says_how_many_pairs_were_asked(place):
    with (place / "small_models.py").open("a") as file:
        file.write("\ndef broken():\n    return torch.nn.Sequential(linear(), Broken())\n")
        file.write("\nclass Broken(torch.nn.Module):\n    def forward(self, logits):\n")
        file.write('        return logits * float("nan")\n')
    broken = ["--model", "small_models:broken", "--data", "set.npz", *PGD, "--out", "runs/broken"]
    assert "finite" in run("attack", *broken, code=2)
    (row,) = runs_in(place / "runs")
    assert row["state"] == "unfinished: 0 of at most 80 (image, attack) pairs decided"


def test_foreign_folders_and_half_written_files_do_not_break_it(runs):
    before = len(runs_in(runs))
    (runs / "notes.txt").write_text("mine")
    written(runs / "other", settings={"theme": "dark"})
    written(runs / "list", settings=[1, 2])
    half = written(runs / "half")
    (half / "settings.json").write_text('{"attacks": ')
    (runs / "loop").symlink_to(runs)
    assert len(runs_in(runs)) == before

    settings = json.loads((runs / "whole" / "settings.json").read_text())
    broken = written(runs / "broken", settings=settings)
    (broken / "report.json").write_text('{"report": {"attacks": {')
    odd = written(runs / "odd", settings=settings | {"attacks": "pgd"}, report={"report": 1})
    by = {row["path"]: row for row in runs_in(runs)}
    assert len(by) == before + 2
    assert by[str(broken)]["complete"] is False  # a report that is half written is none
    assert by[str(odd)]["state"].startswith("cannot be read")
    assert "whole" in run("runs", runs)


def test_text_for_people_names_what_there_is(runs):
    output = run("runs", runs)
    rows = runs_in(runs)
    assert all(row["path"] in output and row["state"] in output for row in rows)
    assert "attack, linear, set, Linf at 2, 8 of 255" in output
    assert f"{len(rows)} runs in" in output and "2 unfinished." in output


def test_rows_are_read_by_other_programs(runs):
    rows = runs_in(runs)
    assert json.loads(run("runs", runs, "--format", "json")) == rows
    table = list(csv.DictReader(io.StringIO(run("runs", runs, "--format", "csv"))))
    assert [row["path"] for row in table] == [row["path"] for row in rows]
    markdown = run("runs", runs, "--format", "MD").splitlines()
    assert markdown[0].startswith("| date | kind | model | data |")
    assert len(markdown) == 2 + len(rows)


def test_what_is_no_folder_and_no_format_is_refused(place):
    assert "FOLDER must be a folder, got runs; runs are made by" in " ".join(
        run("runs", code=2).split()
    )
    assert "must be a folder" in run("runs", "set.npz", code=2)
    assert "--format must be" in run("runs", place, "--format", "html", code=2)
    assert "0 runs in" in run("runs", place)
