"""A folder of rows names the machine of each, and a copy of it replaces nothing else."""

import json

import pytest

from ironmoe.bench.common.rows import kept as folders
from ironmoe.bench.common.rows.kept import Kept, begin_copy
from ironmoe.bench.common.run_folder import OutputError
from ironmoe.bench.common.user_error import UserError


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "kept", {"runs": 3})


def test_rows_of_several_machines_are_counted_as_such(kept, monkeypatch):
    kept.write("one", [{"ms": 1.0}])
    kept.write("two", [{"ms": 2.0}])
    assert len(kept.origins()) == 1
    made = folders.provenance()
    other = made | {"machine": made["machine"] | {"processor": "Another 9000"}}
    monkeypatch.setattr(folders, "provenance", lambda: other)
    kept.write("three", [{"ms": 3.0}])
    assert len(kept.origins()) == 2
    former = {"settings": {"runs": 3}, "processor": "a former version's", "rows": []}
    (kept.folder / "former.json").write_text(json.dumps(former))
    assert len(kept.origins()) == 3 and len(kept.all()) == 4


def test_a_damaged_piece_of_work_is_still_to_be_done_and_named(tmp_path):
    kept = Kept(tmp_path, {}, lambda rows: bool(rows) and all(row["ms"] > 0 for row in rows))
    for name, ms in (("one", 1.0), ("two", -1.0), ("three", 3.0)):
        kept.write(name, [{"ms": ms}])
    kept.write("none", [])
    assert kept.read("one") is not None and kept.read("two") is kept.read("none") is None
    assert [entry["rows"][0]["ms"] for entry in kept.all()] == [1.0, 3.0]
    assert kept.damage(["one", "two"]) == [f"Damaged, and measured anew: two.json in {tmp_path}."]
    assert kept.damage(["one"]) == []


@pytest.mark.parametrize(
    "content",
    [
        [1],
        "text",
        {"rows": []},
        {"settings": {"runs": 3}, "rows": None},
        {"settings": {"runs": 3}, "rows": [1]},
        {"settings": {"runs": 3}, "made": None, "rows": []},
        {"settings": {"runs": 3}, "made": {"machine": 1}, "rows": []},
    ],
)
def test_a_file_of_something_else_is_refused_in_words(kept, content):
    file = kept.folder / "one.json"
    file.write_text(json.dumps(content))
    for read in (lambda: kept.read("one"), kept.all, kept.origins):
        with pytest.raises(UserError, match="holds something else than measured rows"):
            read()


def test_a_copy_may_only_replace_what_it_repeats(kept, tmp_path):
    out = tmp_path / "rows.json"
    begin_copy(out, {"inner": []})
    entry = kept.write("one", [{"ms": 1.0}])
    begin_copy(out, {"inner": [entry]})
    assert json.loads(out.read_text()) == {"inner": [entry]}
    for content in ({"inner": []}, {"methods": [entry]}):
        with pytest.raises(OutputError, match="would not write again"):
            begin_copy(out, content)
    assert json.loads(out.read_text()) == {"inner": [entry]}


@pytest.mark.parametrize("content", ["text", "[1]", '{"rows": 1}', '{"a": [1]}'])
def test_a_foreign_file_is_not_replaced_by_a_copy(tmp_path, content):
    out = tmp_path / "mine"
    out.write_text(content)
    with pytest.raises(OutputError, match="would not write again"):
        begin_copy(out, {"inner": []})
    assert out.read_text() == content
