"""A file of rows grows row by row, is gone on with, and mixes nothing."""

import json
import os

import pytest

from ironmoe.bench.common.machine import origin as origins
from ironmoe.bench.common.machine import provenance
from ironmoe.bench.common.rows import rows_file as files
from ironmoe.bench.common.rows.found import are_ascending_times, are_times
from ironmoe.bench.common.rows.rows_file import rows_file
from ironmoe.bench.common.run_folder import OutputError


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "rows.json"


def opened(out, settings=None, **options):
    return rows_file("bench toy", settings or {"runs": 3}, out=out, **options)


def elsewhere(monkeypatch, **machine):
    """From now on measurements are of another machine."""
    made = files.provenance()
    other = made | {"machine": made["machine"] | machine}
    monkeypatch.setattr(files, "provenance", lambda: other)


def test_a_row_is_in_the_file_as_soon_as_it_is_measured(out):
    with opened(out) as kept:
        kept.put({"shape": (1, 2)}, {"ms": 1.5})
        assert [row["ms"] for row in json.loads(out.read_text())["rows"]] == [1.5]
    with opened(out) as kept:
        row = kept.find({"shape": (1, 2)})
        assert row is not None and row["ms"] == 1.5 and kept.find({"shape": (1, 3)}) is None
        kept.put({"shape": (1, 3)}, {"ms": float("nan")})
    found = json.loads(out.read_text())
    assert [row["ms"] for row in found["rows"]] == [1.5, None]
    assert len(found["sessions"]) == 2 and found["made"]["machine"]["processor"]
    assert found["settings"] == {"runs": 3} and found["benchmark"] == "bench toy"
    assert all("T" in row["measured"] for row in found["rows"])


def test_a_row_of_the_same_key_is_replaced_in_its_place(out):
    with opened(out) as kept:
        for runs, key in ((1, "a"), (1, "b"), (2, "a")):
            kept.put({"name": key}, {"runs": runs})
        assert [(row["name"], row["runs"]) for row in kept.rows] == [("a", 2), ("b", 1)]


def test_other_settings_machines_and_versions_are_refused_by_name(out, monkeypatch):
    with opened(out) as kept:
        kept.put({"a": 1}, {})
    before = out.read_bytes()
    with (
        pytest.raises(OutputError, match=r"runs: 3 there, 5 now.*--again"),
        opened(out, {"runs": 5}),
    ):
        pass
    elsewhere(monkeypatch, processor="Another 9000", threads=64)
    with pytest.raises(OutputError, match=r"machine\.processor: .*'Another 9000' now"), opened(out):
        pass
    assert out.read_bytes() == before
    with opened(out, again=True) as kept:
        assert kept.rows == [] and kept.made["machine"]["processor"] == "Another 9000"


def test_what_was_measured_elsewhere_lies_in_another_folder(monkeypatch):
    with rows_file("bench toy", {"runs": 3}) as kept:
        kept.put({"a": 1}, {})
        first = kept.path
    with rows_file("bench toy", {"runs": 3}) as kept:
        assert kept.path == first and len(kept.rows) == 1
    with rows_file("bench toy", {"runs": 4}) as kept:
        assert kept.path != first and kept.rows == []
    elsewhere(monkeypatch, processor="Another 9000")
    with rows_file("bench toy", {"runs": 3}) as kept:
        assert kept.path != first and kept.rows == []
    assert first.parts[0] == "runs" and first.parent.name.startswith("bench-toy-")


def test_memory_that_a_restart_changes_is_no_other_machine(out, monkeypatch):
    with opened(out) as kept:
        kept.put({"a": 1}, {})
    elsewhere(monkeypatch, memory_gb=1.0)
    with opened(out) as kept:
        assert len(kept.rows) == 1


def test_files_that_a_commit_does_not_tell_apart_are_told_apart(monkeypatch):
    made = files.provenance()
    one, other = made | {"code": "1234"}, made | {"code": "5678"}
    assert origins.origin(one) != origins.origin(other)


def test_a_commit_that_leaves_the_code_as_it_is_begins_nothing_anew(out, monkeypatch):
    with opened(out) as kept:
        kept.put({"a": 1}, {})
    other = files.provenance() | {"commit": "b" * 40}
    monkeypatch.setattr(files, "provenance", lambda: other)
    with opened(out) as kept:
        assert len(kept.rows) == 1


def test_rows_of_other_code_in_another_folder_are_named(monkeypatch):
    with rows_file("bench toy", {"runs": 3}, asked=[{"a": 1}]) as kept:
        kept.put({"a": 1}, {})
        first = kept.path
    with rows_file("bench toy", {"runs": 4}, asked=[{"a": 1}]) as kept:
        assert "otherwise" not in kept.greeting
    other = files.provenance() | {"code": "5678"}
    monkeypatch.setattr(files, "provenance", lambda: other)
    with rows_file("bench toy", {"runs": 3}, asked=[{"a": 1}]) as kept:
        said = kept.greeting
        assert f"Rows in {first} were measured otherwise (code: " in said
        assert "'5678' now" in said
        kept.put({"a": 1}, {})
        assert "otherwise" not in kept.greeting


def without_git(monkeypatch, folder):
    """From now on the code lies in this folder, and no commit says which it is."""
    monkeypatch.setattr(provenance, "CHECKOUT", folder)
    provenance.commit.cache_clear()
    provenance.code_digest.cache_clear()


def test_without_git_rows_of_other_code_are_refused(out, tmp_path, monkeypatch):
    file = tmp_path / "src" / "kernels" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text("one = 1\n")
    with monkeypatch.context() as patched:
        without_git(patched, tmp_path / "src")
        with opened(out) as kept:
            kept.put({"a": 1}, {})
            assert kept.made["commit"] is None and kept.made["code"]
        with opened(out) as kept:
            assert len(kept.rows) == 1

        file.write_text("one = 2\n")
        provenance.code_digest.cache_clear()
        with pytest.raises(OutputError, match=r"code: '.*' there, '.*' now"), opened(out):
            pass
    provenance.commit.cache_clear()
    provenance.code_digest.cache_clear()


def test_again_begins_anew_once_all_rows_are_there_and_else_goes_on(out):
    asked = [{"name": "a"}, {"name": "b"}]
    for name, there in (("a", []), ("b", ["a"]), ("a", [])):
        with opened(out, asked=asked, again=True) as kept:
            assert [row["name"] for row in kept.rows] == there
            kept.put({"name": name}, {})


def test_again_goes_on_while_a_row_is_not_finished(out):
    options = {"asked": [{"a": 1}], "again": True, "is_finished": lambda row: row["runs"] == 2}
    for runs, there in ((1, []), (2, [1]), (1, [])):
        with opened(out, **options) as kept:
            assert [row["runs"] for row in kept.rows] == there
            kept.put({"a": 1}, {"runs": runs})


@pytest.mark.parametrize("content", ["text", "[1]", '{"rows": []}', "null\n1", '{"made": 1}'])
@pytest.mark.parametrize("again", [False, True])
def test_a_foreign_file_is_not_lost(out, content, again):
    out.write_text(content)
    with pytest.raises(OutputError, match="something else"), opened(out, again=again):
        pass
    assert out.read_text() == content


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rows", None),
        ("rows", {"a": 1}),
        ("rows", [1]),
        ("sessions", None),
        ("sessions", "today"),
        ("made", None),
        ("made", {"machine": None}),
        ("benchmark", None),
    ],
)
def test_a_damaged_file_of_rows_is_a_foreign_file(out, key, value):
    with opened(out) as kept:
        kept.put({"a": 1}, {})
    out.write_text(json.dumps(json.loads(out.read_text()) | {key: value}))
    before = out.read_bytes()
    with pytest.raises(OutputError, match="something else than rows of"), opened(out):
        pass
    assert out.read_bytes() == before


@pytest.mark.parametrize("value", [None, "fast", -1.0, float("nan"), float("inf"), True])
def test_a_row_without_its_figures_is_measured_again(out, value):
    def is_whole(row):
        return are_times([row.get("ms")])

    with rows_file("bench cpu", {}, out=out) as kept:
        kept.put({"name": "whole"}, {"ms": 1.0})
        kept.put({"name": "changed"}, {"ms": value})
    asked = [{"name": "whole"}, {"name": "changed"}]
    with rows_file("bench cpu", {}, out=out, asked=asked, is_whole=is_whole) as kept:
        assert kept.missing == [{"name": "changed"}]


def test_damaged_rows_are_measured_again_and_the_command_says_so(out):
    asked = [{"name": name} for name in "abcd"]
    options = {"asked": asked, "is_whole": lambda row: are_times([row.get("ms")])}
    with opened(out) as kept:
        for key in asked:
            kept.put(key, {"ms": 1.0})
    content = json.loads(out.read_text())
    with opened(out, **options) as kept:
        assert kept.missing == [] and "row was" not in kept.greeting

    a, b, c, d = content["rows"]
    for rows, missing, words in (
        ([a | {"ms": -1}, b, c, d], "a", "3 of 4 rows are there. 1 row was damaged: measured anew"),
        ([a, b | {"measured": 5}, c, d], "b", "1 row was damaged"),
        ([a, b, c, {"name": "d", "ms": 1.0}], "d", "1 row was damaged"),
        ([a, b, c, d, c | {"ms": 2.0}], "c", "2 rows were damaged"),
        ([a | {"ms": None} for _ in asked], "abcd", "0 of 4 rows are there. 4 rows were damaged"),
        ([a, b, c, d, {"name": "e"}], "", "1 row was damaged: left out"),
    ):
        out.write_text(json.dumps(content | {"rows": rows}))
        with opened(out, **options) as kept:
            assert kept.missing == [{"name": name} for name in missing]
            assert words in kept.greeting
            for key in kept.missing:
                kept.put(key, {"ms": 3.0})
        with opened(out, **options) as kept:
            assert kept.missing == [] and "row was" not in kept.greeting


@pytest.mark.parametrize(
    ("times", "possible"),
    [
        ((1.0, 2.0, 3), True),
        ((2.0, 2.0 * (1 - 1e-15), 2.0), True),  # a quartile is rounded
        ((1.0, 3.0, 2.0), False),
        ((1.0, None, 2.0), False),
        ((1.0, "2", 3.0), False),
        ((0.0, 1.0, 2.0), False),
        ((1.0, 2.0, float("inf")), False),
    ],
)
def test_times_of_the_same_runs_stand_in_their_order(times, possible):
    assert are_ascending_times(times) == possible


def test_rows_of_another_benchmark_are_a_foreign_file(out):
    with rows_file("bench other", {}, out=out):
        pass
    message = "something else than rows of ironmoe bench toy"
    with pytest.raises(OutputError, match=message), opened(out, again=True):
        pass


def test_an_empty_file_is_written_to(out):
    out.touch()
    with opened(out) as kept:
        assert kept.rows == [] and json.loads(out.read_text())["rows"] == []


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("absent/rows.json", "in a folder that exists"),
        (".", "must be a file, got the folder"),
        (os.devnull, "must be a file, got the device"),
        ("/proc/rows.json", "cannot be written"),
        ("rows.csv", "--out writes JSON, got .*rows.csv; choose a file that ends in .json"),
    ],
)
def test_a_place_that_no_file_can_have_is_refused(tmp_path, place, message):
    with pytest.raises(OutputError, match=message), opened(tmp_path / place):
        pass


def test_two_commands_do_not_write_one_file(out):
    with opened(out) as kept:
        with pytest.raises(OutputError, match="in use by another command"), opened(out):
            pass
        kept.put({"a": 1}, {})
        with pytest.raises(OutputError, match="in use by another command"), opened(out):
            pass
    with opened(out) as kept:
        assert len(kept.rows) == 1
