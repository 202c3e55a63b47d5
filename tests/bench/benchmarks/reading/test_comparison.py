"""Two files of rows: ratios by hand, what is noise, and what is said before a ratio is read."""

import csv
import io
import json
import math
import random

import pytest
from row_files import cpu_row

from ironmoe.attacks import Proportion
from ironmoe.bench.benchmarks.reading.comparison import Change, compare_files
from ironmoe.bench.benchmarks.reading.comparison_table import all_warnings
from ironmoe.bench.benchmarks.reading.figures import RATE, SHARE, TIME, Reading, plain
from ironmoe.bench.benchmarks.reading.files import RowsError
from ironmoe.bench.benchmarks.reading.kinds import KINDS
from ironmoe.bench.benchmarks.reading.origin_words import warnings


def change(a, b, sort=TIME):
    kind = KINDS[0]
    return Change(kind, ("x",) * len(kind.keys), plain("f", "f", sort), Reading(*a), Reading(*b))


@pytest.fixture
def run(tmp_path, monkeypatch):
    cli = pytest.importorskip("ironmoe.bench.cli.app")
    runner = pytest.importorskip("typer.testing").CliRunner()
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: runner.invoke(
        cli.app, ["bench", "compare", *map(str, arguments)], env={"COLUMNS": "120"}
    )


def test_ratios_and_their_geometric_mean_by_hand(rows_in):
    a = rows_in("a.json", [cpu_row(), cpu_row(dtype="bfloat16")])
    b = rows_in("b.json", [cpu_row(2.0), cpu_row(0.5, dtype="bfloat16")])
    found = compare_files(a, b)
    ratios = {(c.key[1], c.who): c.change for c in found.changes}
    assert ratios == {
        ("float32", "ironmoe"): 2.0,
        ("bfloat16", "ironmoe"): 0.5,
        ("float32", "dense"): 1.0,
        ("bfloat16", "dense"): 1.0,
    }
    means = {mean.who: (mean.rows, mean.change) for mean in found.means()}
    assert means == {"ironmoe": (2, pytest.approx(1.0)), "dense": (2, pytest.approx(1.0))}
    assert found.only_a == found.only_b == [] and all_warnings(found) == []


@pytest.mark.parametrize(
    ("a", "b", "sort", "verdict"),
    [
        ((100, 98, 102), (120, 118, 122), TIME, "slower"),
        ((100, 98, 102), (80, 79, 81), TIME, "faster"),
        ((100, 98, 102), (80, 79, 81), RATE, "slower"),
        ((100, 80, 120), (115, 110, 120), TIME, "within noise"),  # the ranges overlap
        ((100, 99.9, 100.1), (102, 101.9, 102.1), TIME, "within noise"),  # 2 % are no regression
        ((102, 101.9, 102.1), (100, 99.9, 100.1), TIME, "within noise"),
        ((100, 99, 101), (106, 105.5, 106.5), TIME, "slower"),
        ((100, None, None), (300, 290, 310), TIME, ""),  # nothing is known of A
        ((0.5, 0.4, 0.6), (0.55, 0.45, 0.65), SHARE, "within noise"),
        ((0.5, 0.49, 0.51), (0.52, 0.515, 0.53), SHARE, "higher"),
        ((0.5, 0.49, 0.51), (0.0, 0.0, 0.01), SHARE, "lower"),
    ],
)
def test_a_change_counts_where_ranges_are_apart(a, b, sort, verdict):
    assert change(a, b, sort).verdict == verdict


@pytest.mark.parametrize(
    ("ratio", "others", "verdict"),
    [
        (2.0, (1.95, 1.5), "as others"),  # within 5 % of 1.95
        (2.0, (1.8, 1.5), "slower"),
        (2.0, (0.5,), "slower"),
        (1.3, (1.9, 1.8), "as others"),
        (0.5, (0.52,), "as others"),
        (0.5, (0.6, 1.2), "faster"),
        (1.04, (1.9,), "within noise"),
        (2.0, (), "slower"),
    ],
)
def test_what_the_machine_did_to_others_is_no_change_of_ours(ratio, others, verdict):
    a, b = (100, 99.9, 100.1), (100 * ratio, 99.9 * ratio, 100.1 * ratio)
    assert change(a, b)._replace(others=others).verdict == verdict


def test_others_are_those_that_took_turns_with_a_row(rows_in, run):
    slow = cpu_row(2.0)
    slow["milliseconds"]["dense"] *= 1.95
    slow["fastest"]["dense"] *= 1.95
    a = rows_in("a.json", [cpu_row(), cpu_row(dtype="bfloat16")])
    b = rows_in("b.json", [slow, cpu_row(2.0, dtype="bfloat16")])
    found = {(c.key[1], c.who): c for c in compare_files(a, b).changes}
    assert found["float32", "ironmoe"].others == (pytest.approx(1.95),)
    assert found["float32", "ironmoe"].verdict == "as others"
    assert found["bfloat16", "ironmoe"].others == (1.0,)
    assert found["bfloat16", "ironmoe"].verdict == "slower"
    output = run(a, b).output
    assert "beside the others" in output and '"as others": the ratio lies between' in output
    assert found["float32", "dense"].others == (), "ours shows nothing of the machine"


def test_noise_is_what_the_facing_ends_of_both_ranges_leave():
    assert change((100, 90, 105), (200, 196, 230)).noise == pytest.approx(0.09)
    assert change((200, 196, 230), (100, 90, 105)).noise == pytest.approx(0.045)
    assert change((0.5, 0.45, 0.52), (0.6, 0.58, 0.61), SHARE).noise == pytest.approx(0.04)
    assert change((100, 90, None), (200, 196, None)).noise == pytest.approx(0.14), "as far above"
    assert change((100, None, None), (100, 99, 101)).noise is None
    assert math.isnan(change((0, None, None), (1, None, None)).change)


def test_a_change_is_judged_by_the_noise_that_is_printed():
    """2 of 30 and 8 of 30 images: Wilson's intervals overlap though 20 points lie between them."""
    few, more = (Proportion(count, 30).as_dict() for count in (2, 8))
    a, b = (Reading(share["value"], *share["wilson_95"]) for share in (few, more))
    found = change(a, b, SHARE)
    assert found.verdict == "within noise" and found.noise > found.change == pytest.approx(0.2)

    numbers = random.Random(0)
    for sort in (TIME, RATE, SHARE):
        for _ in range(200):
            a, b = (
                (value, value - numbers.uniform(0, 0.1), value + numbers.uniform(0, 0.1))
                for value in (numbers.uniform(0.3, 0.8), numbers.uniform(0.3, 0.8))
            )
            found = change(a, b, sort)
            size = abs(found.change - (sort != SHARE))
            limit = max(found.noise, 0.05 * (sort != SHARE))
            assert (found.verdict == "within noise") == (size <= limit)
            apart = a[2] < b[1] or b[2] < a[1]
            assert apart == (size > found.noise), "the ranges are apart where the noise is passed"


def test_rows_that_only_one_file_has_are_named(rows_in, run):
    a = rows_in("a.json", [cpu_row(), cpu_row(dtype="bfloat16")])
    b = rows_in("b.json", [cpu_row(1.1), cpu_row(shape=(9, 9, 9, 3, 1))])
    found = compare_files(a, b)
    assert {key[1] for _, key in found.only_a} == {"bfloat16"}
    assert {key[0] for _, key in found.only_b} == {"9,9,9,3,1"}
    output = run(a, b).output
    assert "Only A has 2 rows: 8,4,4,2,1 bfloat16 forward ironmoe" in output
    assert "Only B has 2 rows: 9,9,9,3,1" in output


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"processor": "Xeon"}, "OTHER MACHINES: processor AMD EPYC 9654 in A, Xeon in B. "),
        ({"threads": 1}, "OTHER MACHINES: threads 2 in A, 1 in B. "),
        ({"gpus": ["NVIDIA H100"]}, None),  # a GPU that A does not name is not known to be another
        ({"processor": None}, "B does not name the processor"),
    ],
)
def test_another_machine_is_said_first(rows_in, run, machine, words):
    a = rows_in("a.json", [cpu_row()])
    b = rows_in("b.json", [cpu_row(2.0)], machine=machine)
    output = run(a, b).output
    if words is None:
        assert "MACHINES" not in output
        return
    assert words in output and "compare machines, not code" in output
    assert output.index(words) < output.index("2.000×")


def test_two_gpus_are_two_machines_and_need_no_processor():
    h100, h200 = {"GPU": "NVIDIA H100"}, {"GPU": "NVIDIA H200"}
    assert warnings(h100, h100) == []
    assert "GPU NVIDIA H100 in A, NVIDIA H200 in B" in warnings(h100, h200)[0]


def test_versions_commits_and_settings_that_differ_are_named(rows_in, run):
    a = rows_in("a.json", [cpu_row()])
    made = {"commit": "b" * 40, "versions": {"torch": "2.14.0"}}
    b = rows_in("b.json", [cpu_row(1.5)], made=made, settings={"runs": 3})
    output = run(a, b).output
    assert "torch 2.13.0 in A, 2.14.0 in B" in output and "commit aaaa" in output
    assert "OTHER SETTINGS: runs 9 in A, 3 in B." in output


def test_times_of_others_show_how_much_the_machine_changed(rows_in, run):
    output = run(rows_in("a.json", [cpu_row()]), rows_in("b.json", [cpu_row(1.5)])).output
    assert (
        "Times of ironmoe changed by 1.500×, those of others in the same rows by 1.000×" in output
    )


def test_one_file_twice_and_a_copy_are_refused(rows_in, run, tmp_path):
    a = rows_in("a.json", [cpu_row()])
    (tmp_path / "link.json").symlink_to(a)
    (tmp_path / "copy.json").write_bytes(a.read_bytes())
    for other, words in ((a, "got"), ("link.json", "got"), ("copy.json", "is a copy of")):
        result = run(a, other)
        assert result.exit_code == 2 and words in result.output and result.output.count("\n") == 1


def test_other_benchmarks_and_other_work_are_refused(rows_in, tmp_path):
    a = rows_in("a.json", [cpu_row()])
    attacks = []
    for images in (100, 200):
        row = {
            "attack": "PGD", "model": "ViT", "library": "ironmoe", "seconds": 1.0,
            "robust": {"value": 0.5, "total": images},
        }  # fmt: skip
        attacks.append(tmp_path / f"{images}.json")
        attacks[-1].write_text(json.dumps([row]))
    with pytest.raises(RowsError, match=r"a\.json has rows of bench cpu, .* of bench attacks"):
        compare_files(a, attacks[0])
    with pytest.raises(RowsError, match=r"no row of .* images is 100 in A, 200 in B"):
        compare_files(*attacks)
    with pytest.raises(RowsError, match=r"--only must be part of what names a row of .*'float64'"):
        compare_files(a, rows_in("b.json", [cpu_row(2.0)]), ["float64"])


def test_only_knows_a_layer_by_the_name_that_it_was_measured_by(rows_in):
    rows = [cpu_row() | {"name": "decode-32"}, cpu_row(shape=(9, 9, 9, 3, 1)) | {"name": "olmoe"}]
    a, b = rows_in("a.json", rows), rows_in("b.json", [rows[0] | cpu_row(2.0), rows[1]])
    found = compare_files(a, b, ["decode-32", "ironmoe"])
    assert [c.key for c in found.changes] == [("8,4,4,2,1", "float32", "forward", "ironmoe")]
    with pytest.raises(RowsError, match=r"got 'decode-64'; names are 8,4,4,2,1; .*decode-32; "):
        compare_files(a, b, ["decode-64"])


def test_only_keeps_rows_that_have_every_text(rows_in):
    rows = [cpu_row(), cpu_row(dtype="bfloat16")]
    a, b = rows_in("a.json", rows), rows_in("b.json", [cpu_row(2.0), *rows[1:]])
    found = compare_files(a, b, ["FLOAT32", "iron"])
    assert [change.key for change in found.changes] == [
        ("8,4,4,2,1", "float32", "forward", "ironmoe")
    ]


def test_formats_hold_the_rows_alone_on_standard_output(rows_in, run):
    a, b = rows_in("a.json", [cpu_row()]), rows_in("b.json", [cpu_row(2.0)])
    rows = list(csv.DictReader(io.StringIO(run(a, b, "--format", "CSV").stdout)))
    assert [(row["implementation"], float(row["ratio"])) for row in rows] == [
        ("ironmoe", 2.0),
        ("dense", 1.0),
    ]
    assert rows[0]["verdict"] == "slower" and float(rows[0]["noise"]) == pytest.approx(0.3)
    whole = json.loads(run(a, b, "--format", "json").stdout)
    assert whole["rows"][0]["ratio"] == 2.0 and whole["a"]["origin"]["threads"] == "2"
    assert whole["means"][0] == {
        "benchmark": "bench cpu", "figure": "ms", "implementation": "ironmoe", "rows": 1,
        "ratio": 2.0,
    }  # fmt: skip
    assert run(a, b, "--format", "md").stdout.startswith("| benchmark | shape |")
    refused = run(a, b, "--format", "xml")
    assert refused.exit_code == 2 and "--format must be csv, json, md" in refused.output
