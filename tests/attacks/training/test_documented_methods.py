"""docs/training.md names every method that there is, with the cost that is counted."""

import re

import pytest
import training_table

import ironmoe.attacks.training
from ironmoe.attacks.training import TRAINING_METHODS

PAGE = training_table.PAGE.read_text()


def test_the_documented_table_of_methods_is_that_of_the_register():
    assert training_table.BEGIN in PAGE and training_table.END in PAGE
    message = f"write it anew with: {training_table.COMMAND}"
    assert training_table.with_table(PAGE) == PAGE, message
    assert all(line.count("|") == 7 for line in training_table.table().splitlines())


def test_every_registered_method_is_exported_and_advised_on():
    advice = (
        PAGE.partition("\n## Methods")[2].partition("\n## ")[0].partition(training_table.END)[2]
    )
    for entry in TRAINING_METHODS.values():
        kind = entry.kind.__name__
        assert kind in ironmoe.attacks.training.__all__
        assert f"`{kind}`" in advice or kind == "Standard", kind


@pytest.mark.parametrize("name", TRAINING_METHODS)
def test_a_cost_is_a_number_of_forward_passes(name):
    assert re.fullmatch(r"(\d*n \+ )?\d+|\d+m", TRAINING_METHODS[name].cost)
