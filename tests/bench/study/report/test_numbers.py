"""``report.json`` holds all that the page needs, and several of them go together as one study."""

import json
import re
from math import isnan, nan

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ironmoe.bench.cli.app import app
from ironmoe.bench.common.files import write_json_lines
from ironmoe.bench.study import run
from ironmoe.bench.study.claims.table import verdicts
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.numbers.columns import as_columns, as_rows
from ironmoe.bench.study.numbers.document import (
    Numbers,
    NumbersError,
    as_document,
    read_numbers,
    todays_versions,
)
from ironmoe.bench.study.report.page import write_study_report
from ironmoe.bench.study.statistics.measured import Measured

QUIET = Console(quiet=True)
NAMES = ("dense", "E2", "E8", "E32", "E8-renorm")  # in the order of the ladder


@pytest.fixture(scope="module")
def whole(made_up):
    """A study, with the digits that a file has."""
    made = made_up(NAMES, seeds=3, trainings=("standard", "pgd-at"))
    made.rows = as_rows(as_columns(made.rows))
    return made


def written(path, made, rows=None, **changes):
    """The file of the numbers of a study, or of some of its runs."""
    rows = made.rows if rows is None else rows
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = made.facts._replace(**changes)
    arms = {row.arm for row in rows}
    facts = facts._replace(arms=tuple(each for each in facts.arms if each.arm.name in arms))
    found = verdicts(rows, made.arms)
    numbers = Numbers(facts, rows, todays_versions(facts))
    write_json_lines(path, json.loads(json.dumps(as_document(numbers, found))), 2)
    return path


def test_columns_give_the_rows_back():
    rows = [
        Measured("dense", "standard", 3, {"clean": 0.1234567891, "odd": nan}, {"clean": [1, 0, 1]}),
        Measured(
            "E8",
            "pgd-at",
            0,
            {"swap": 2.0},
            {"swap": [nan, 1e-9], "pgd@8": [0.0, 1.0], "least_eps": [1.0, 1.0], "kl": [0.5]},
        ),
    ]
    columns = as_columns(rows)
    assert columns["images"]["clean"] == ["101", None]
    dense, moe = as_rows(json.loads(json.dumps(columns)))
    assert dense[:3] == ("dense", "standard", 3) and moe[:3] == ("E8", "pgd-at", 0)
    assert dense.values == {"clean": 0.1234567891} and moe.values == {"swap": 2.0}
    assert dense.images == {"clean": [1, 0, 1]}
    assert isnan(moe.images["swap"][0]) and moe.images["swap"][1] == 1e-9
    assert moe.images["pgd@8"] == [0, 1] and moe.images["least_eps"] == [1, 1]
    assert "kl" not in moe.images  # no claim and no figure reads it


def test_the_file_has_all_that_the_page_needs(made_up, tmp_path):
    small = made_up(("dense", "E2", "E8"), seeds=2)
    small.rows = as_rows(as_columns(small.rows))
    read = read_numbers(written(tmp_path / "report.json", small))
    pages = []
    for name, facts, rows in (("a", small.facts, small.rows), ("b", read.facts, read.runs)):
        (tmp_path / name).mkdir()
        found = verdicts(rows, small.arms)
        write_study_report(tmp_path / name, facts, rows, found, small.arms)
        pages.append((tmp_path / name / "report.html").read_text())
    assert len(re.findall("<img", pages[0])) > 10
    one, other = (re.sub("This report was written [^<]*", "", page) for page in pages)
    assert one == other


@pytest.mark.parametrize("by", ["seed", "arm", "training"])
def test_two_halves_are_the_whole(whole, tmp_path, monkeypatch, by):
    """Whatever was done where: the verdicts and numbers are those of one study."""
    monkeypatch.setattr(run, "FIGURES", ())
    here = {"seed": (0, 2), "arm": ("E8", "dense"), "training": ("pgd-at",)}[by]
    parts = [
        [row for row in whole.rows if (getattr(row, by) in here) == is_here]
        for is_here in (True, False)
    ]
    files = [
        written(tmp_path / str(place) / "report.json", whole, rows, **changes)
        for place, (rows, changes) in enumerate(
            zip(parts, ({"machine": "one", "notes": ("note",)}, {"machine": "two"}), strict=True)
        )
    ]
    out = run.join_studies(files, tmp_path / "out", QUIET)
    read = read_numbers(out / "report.json")
    trainings = list(read.facts.budgets)
    assert read.runs == sorted(
        whole.rows,
        key=lambda row: (row.seed, trainings.index(row.training), NAMES.index(row.arm)),
    )

    expected = {(v.claim, v.training): v for v in verdicts(whole.rows, whole.arms)}
    found = verdicts(read.runs, [each.arm for each in read.facts.arms])
    assert {(v.claim, v.training): v for v in found} == expected
    assert [each.arm.name for each in read.facts.arms] == list(NAMES)
    assert read.facts.machine == "one; two" and read.facts.notes == ("note",)
    assert read.facts.joined == tuple(map(str, files))
    text = (out / "report.html").read_text()
    assert "Put together from" in text and "Machine of this report" not in text

    again = run.join_studies([out / "report.json"], tmp_path / "again", QUIET)
    assert read_numbers(again / "report.json").runs == read.runs


def test_models_of_several_studies_are_compared_with_one_dense_model(
    made_up, tmp_path, monkeypatch
):
    """Each was the dense one of its own study."""
    monkeypatch.setattr(run, "FIGURES", ())
    made = made_up(("dense", "E8"), handed_in=("a=b",), training=None)
    small = Arm("small")
    facts = made.facts.arms[0]._replace(arm=small, flops=made.facts.arms[0].flops // 2)
    rows = [row._replace(arm="small") for row in made.rows if row.arm == "dense"]
    files = [written(tmp_path / "a.json", made)]
    made.arms, made.facts = [small], made.facts._replace(arms=(facts,))
    files.append(written(tmp_path / "b.json", made, rows))
    out = run.join_studies(files, tmp_path / "out", QUIET)
    found = {each.arm.name: each.arm for each in read_numbers(out / "report.json").facts.arms}
    assert found["small"].equal_width and not found["dense"].equal_width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checksum": "other"}, "data.checksum: 'c0ffee' there, 'other' now"),
        ({"classes": 3}, "data.classes"),
        ({"training": None}, "training.settings"),
        ({"budgets": None}, "budgets.standard.images: 40 there, 7 now"),
        ({}, "the run dense, standard, seed 0 must be in one study, got it in"),
    ],
)
def test_studies_that_do_not_go_together_are_refused(whole, tmp_path, changes, message):
    if "budgets" in changes:
        budgets = whole.facts.budgets
        changes = {"budgets": budgets | {"standard": budgets["standard"]._replace(images=7)}}
    files = [
        written(tmp_path / "a.json", whole, whole.rows[:1]),
        written(tmp_path / "b.json", whole, whole.rows[: 1 if not changes else 2], **changes),
    ]
    with pytest.raises(NumbersError, match=re.escape(message)):
        run.join_studies(files, tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


def test_numbers_of_another_version_of_a_measurement_are_refused(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "FIGURES", ())
    one = written(tmp_path / "a.json", whole, whole.rows[:1])
    other = written(tmp_path / "b.json", whole, whole.rows[1:2])
    document = json.loads(other.read_text())
    document["measurements"]["swaps"] += 1
    other.write_text(json.dumps(document))
    alone = run.join_studies([other], tmp_path / "alone", QUIET)
    assert (
        json.loads((alone / "report.json").read_text())["measurements"] == document["measurements"]
    )
    assert "swaps: measured by an earlier version" in (alone / "report.html").read_text()
    with pytest.raises(NumbersError, match=r"version of measurement\.swaps"):
        run.join_studies([one, other], tmp_path / "both", QUIET)


def damaged(document, how):
    if how == "column":
        document["values"]["clean"].pop()
    elif how == "field":
        document["budgets"]["standard"]["love"] = 1
    elif how == "measurement":
        document["measurements"]["love"] = 1
    elif how == "format":
        document["format"] = "numbers of ironmoe study, 99"
    elif how == "missing":
        del document["runs"]
    elif how == "kind":
        document["values"] = []
    return document


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("column", "is damaged"),
        ("field", "is damaged"),
        ("missing", "is damaged"),
        ("kind", "is damaged"),
        ("measurement", "has measurements that this version does not know: ['love']"),
        ("format", "has no entry “format”"),
    ],
)
def test_a_file_that_is_no_report_is_refused(whole, tmp_path, how, message):
    file = written(tmp_path / "a.json", whole, whole.rows[:2])
    file.write_text(json.dumps(damaged(json.loads(file.read_text()), how)))
    with pytest.raises(NumbersError, match=f"--from must be.*{re.escape(f'{file} {message}')}"):
        read_numbers(file)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"text"', "\0"])
def test_any_other_file_is_refused(tmp_path, text):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(NumbersError, match="--from must be"):
        read_numbers(file)


def study(*arguments):
    return CliRunner().invoke(app, ["study", *map(str, arguments)], terminal_width=200)


def test_the_command_reads_files(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "FIGURES", ())
    file = written(tmp_path / "a.json", whole)
    result = study("--from", file, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "report.html").is_file() and "UNDECIDED" in result.output

    for arguments in (["--seeds", "3"], ["--data", "digits"], ["--quick"], ["--model", "a=b"]):
        result = study("--from", file, *arguments)
        text = " ".join(result.output.replace("│", " ").split())
        assert result.exit_code == 2, text
        assert f"--from goes together with --out alone, got {arguments[0]}, too" in text
    result = study("--from", tmp_path / "none.json")
    assert result.exit_code == 2 and "cannot be read" in result.output
