"""No number beside an axis stands on another one."""

import pytest
from matplotlib import pyplot as plt

from ironmoe.bench.reports.ticks import overlapping, thin_out


@pytest.fixture
def axes():
    figure, axes = plt.subplots(figsize=(3, 2))
    yield axes
    plt.close(figure)


def texts(axis):
    return [label.get_text() for label in axis.get_majorticklabels()]


def test_numbers_that_are_close_are_left_out_and_the_ends_stay(axes):
    places = [0, 2, 4, 8, 12, 12.75, 25.5, 255]
    axes.set_xticks(places, list(map(str, places)))
    assert overlapping(axes.figure)
    thin_out(axes.figure)
    assert not overlapping(axes.figure)
    shown = texts(axes.xaxis)
    assert shown[0] == "0" and shown[-1] == "255" and "4" not in shown
    assert axes.get_xticks().tolist() == places  # the marks stay


def test_numbers_beside_an_upright_axis_are_left_out_too(axes):
    axes.set_yticks(range(40), [f"row {number}" for number in range(40)])
    thin_out(axes.figure)
    assert not overlapping(axes.figure) and texts(axes.yaxis)[-1] == "row 39"


def test_numbers_with_room_stay_as_they_are(axes):
    axes.set_xticks([0, 8, 16], ["0", "8", "16"])
    axes.set_xlim(-1, 17)
    locator = axes.xaxis.get_major_locator()
    thin_out(axes.figure)
    assert texts(axes.xaxis) == ["0", "8", "16"] and axes.xaxis.get_major_locator() is locator


def test_turned_names_stay(axes):
    names = [f"expert {number}" for number in range(12)]
    axes.set_xticks(range(12), names, rotation=45, ha="right")
    thin_out(axes.figure)
    assert texts(axes.xaxis) == names
