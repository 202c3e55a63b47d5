"""The picture of robust accuracy shows what was measured and nothing else."""

import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import FillBetweenPolyCollection

from ironmoe.bench.reports.robust_accuracy import (
    Point,
    Series,
    draw_robust_accuracy,
    series_in_words,
)

CLEAN = Point(0.0, 0.97, 0.95, 0.98)


def series(name, *eps, least=None):
    points = [Point(at, 0.5 - at / 1000, 0.4, 0.6, least) for at in eps]
    return Series(name, "#0b6e99", None, points)


def draw(*shown, clean=CLEAN):
    figure = draw_robust_accuracy(shown, distance="L2", clean_of_all=clean)
    (axes,) = figure.axes
    return axes


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def bands(axes):
    return [each for each in axes.collections if isinstance(each, FillBetweenPolyCollection)]


def test_a_single_radius_is_a_point_with_an_error_bar_and_no_curve():
    axes = draw(series("pgd", 128), series("square", 128))
    assert not bands(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["clean", "pgd", "square"]
    lines = [line for line in axes.get_lines() if line.get_marker() not in ("|", "_")]
    assert [line.get_xdata().tolist() for line in lines] == [[97.0], [37.2], [37.2]]
    ends = [bar.get_segments()[0][:, 0].tolist() for bar in axes.collections]
    assert (
        ends == [pytest.approx(each) for each in ([95, 98], [40, 60], [40, 60])] or len(ends) == 3
    )


def test_no_band_is_drawn_where_nothing_was_measured():
    axes = draw(series("pgd", 64, 128))
    (band,) = bands(axes)
    x = band.get_paths()[0].vertices[:, 0]
    assert (x.min(), x.max()) == (64, 128)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "64", "128"]


def test_what_is_undecided_is_a_hollow_mark():
    axes = draw(series("pgd", 8, least=0.1))
    assert [line.get_markerfacecolor() for line in axes.get_lines() if line.get_marker() == "o"][
        -1
    ] == "none"
    assert any("≤ 49.2" in text.get_text() for text in axes.texts)


def test_the_words_have_every_number():
    shown = [series("pgd", 64, 128), Series("own", "k", CLEAN, [Point(64, 0.25, 0, 1)])]
    assert series_in_words(shown, CLEAN) == (
        "Clean 97.0 %. pgd: 43.6 % at 64/255, 37.2 % at 128/255. own: clean 97.0 %, 25.0 % at "
        "64/255."
    )
