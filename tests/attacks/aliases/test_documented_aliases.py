"""What docs/attacks.md says to people who come from other libraries."""

import re

import alias_table
import conformance
import pytest

import ironmoe.attacks
from ironmoe.attacks.attack import Attack

PAGE = alias_table.PAGE.read_text()
SECTION = PAGE.partition("\n## Coming from other libraries")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| (`.*) \| (`.*) \|$", SECTION.partition(alias_table.BEGIN)[0], re.MULTILINE)
CALLS = [call for _, here in ROWS for call in re.findall(r"`(\w[\w.]*\(.*?\))`", here)]


def test_the_documented_table_of_aliases_is_what_the_classes_declare():
    assert alias_table.BEGIN in PAGE and alias_table.END in PAGE
    assert alias_table.with_table(PAGE) == PAGE, f"write it anew with: {alias_table.COMMAND}"


@pytest.mark.parametrize("call", CALLS)
def test_what_is_written_beside_a_foreign_class_can_be_called(call):
    names = {name: getattr(ironmoe.attacks, name) for name in ironmoe.attacks.__all__}
    names |= {"model": conformance.network(), "eps": 0.1, "alpha": 0.02, "steps": 3, "decay": 0.9}
    assert isinstance(eval(call, names | {"norm": "L2"}), Attack)


def test_every_row_names_a_call():
    assert len(ROWS) >= 14 and len(CALLS) > len(ROWS)
