"""Rows as text are read back by the programs that the formats are for."""

import csv
import io
import json

import pytest

from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.reports.formats import FORMATS, checked_format, written_rows

ROWS = [
    {"name": "one, two", "shape": (8, 4, 2), "ms": {"ours": 1.25, "peer": None}, "ok": True},
    {"name": 'a "quote"|\nline', "shape": [8, 4, 2], "ms": {"ours": float("nan")}, "runs": 3},
]
COLUMNS = ["name", "shape", "ms.ours", "ms.peer", "ok", "runs"]


def test_csv_is_read_back_by_the_csv_module():
    found = list(csv.DictReader(io.StringIO(written_rows(ROWS, "csv"), newline="")))
    assert list(found[0]) == COLUMNS
    assert list(found[0].values()) == ["one, two", "8,4,2", "1.25", "", "True", ""]
    assert list(found[1].values()) == ['a "quote"|\nline', "8,4,2", "", "", "", "3"]


def test_json_keeps_what_is_nested_and_has_no_nan():
    first, second = json.loads(written_rows(ROWS, "json"))
    assert first == {**ROWS[0], "shape": [8, 4, 2]}
    assert second["ms"] == {"ours": None}


def test_markdown_has_a_line_for_each_row_whatever_is_in_a_cell():
    lines = written_rows(ROWS, "md").splitlines()
    assert lines[0] == "| name | shape | ms.ours | ms.peer | ok | runs |" and len(lines) == 4
    assert lines[3].startswith(r'| a "quote"\| line | 8,4,2 |')
    assert written_rows([{"ms": 84.0123456789}], "md").splitlines()[2] == "| 84.0123 |"


@pytest.mark.parametrize("form", FORMATS)
def test_no_rows_are_text_too(form):
    assert written_rows([], form).endswith("\n")


def test_a_format_has_its_name_in_any_case():
    assert (checked_format(None), checked_format("CSV")) == (None, "csv")
    with pytest.raises(UserError, match="--format must be csv, json, md, got 'xml'"):
        checked_format("xml")
