"""Figures: thin lines are runs, thick ones their means, and nothing is hidden or made up."""

import math
from io import BytesIO
from itertools import combinations

import numpy as np
import pytest
from matplotlib import pyplot as plt

from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.clusters import CLUSTERS
from ironmoe.bench.study.report.figures.error_against_dense import (
    ERROR_AGAINST_DENSE,
    differences,
)
from ironmoe.bench.study.report.figures.error_over_eps import UNDER_PGD
from ironmoe.bench.study.report.figures.interventions import INTERVENTIONS, accuracy_changes
from ironmoe.bench.study.report.figures.over_experts import OVER_EXPERTS
from ironmoe.bench.study.report.figures.parts.clouds import known_pairs
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.groups import at_equal_cost, few
from ironmoe.bench.study.report.figures.parts.lines import MEAN, RUN, run_lines
from ironmoe.bench.study.report.figures.parts.log_axis import log_axis, log_ticks
from ironmoe.bench.study.report.figures.parts.looks import looks
from ironmoe.bench.study.report.figures.routing_change import ROUTING_CHANGE, shown_layers
from ironmoe.bench.study.report.figures.slopes import SLOPES
from ironmoe.bench.study.report.figures.smoothness import SMOOTHNESS
from ironmoe.bench.study.report.figures.swaps import SWAPS, share_within
from ironmoe.bench.study.report.figures.table import FIGURES
from ironmoe.bench.study.report.figures.top_experts import TOP_EXPERTS, of_models
from ironmoe.bench.study.report.runs import StudyRuns

OF_RUNS = [figure for figure in FIGURES if figure.needs]

NAMES = ("dense", "E2", "E8", "E8-renorm", "E8-K1")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def runs(made_up):
    study = made_up(NAMES, trainings=("standard", "pgd-at"))
    return StudyRuns(study.rows, study.arms, study.facts)


@pytest.fixture(scope="session")
def draw(runs):
    """Each figure of these runs, drawn once."""
    found = {}

    def drawn(figure):
        if figure.name not in found:
            found[figure.name] = figure.drawn(runs)
        return found[figure.name]

    return drawn


def runs_of(study):
    return StudyRuns(study.rows, study.arms, study.facts)


def lines(axes, gid):
    return [line for line in axes.lines if line.get_gid() == gid]


def panel(figure, title):
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return axes


@pytest.mark.parametrize("figure", OF_RUNS, ids=lambda figure: figure.name)
def test_every_figure_is_drawn_with_runs_means_units_and_a_caption(runs, draw, figure):
    drawn = draw(figure)
    assert drawn is not None
    titles = [axes.get_title(loc="left") for axes in drawn.axes]
    assert {title.partition(":")[0].partition(",")[0] for title in titles} == {"standard", "pgd-at"}
    for axes in drawn.axes:
        assert lines(axes, RUN) and lines(axes, MEAN)
        assert axes.get_xlabel()
        thin = max(line.get_linewidth() for line in lines(axes, RUN))
        marks = [line.get_markeredgewidth() for line in lines(axes, MEAN)]
        thick = [line.get_linewidth() for line in lines(axes, MEAN)]
        assert min(thick) > thin or min(marks) > 1
    caption = figure.caption(runs)
    assert "3 runs an arm" in caption and "nan" not in caption
    assert "\nstandard: " in caption and "\npgd-at: " in caption
    assert caption.endswith(".") and ".." not in caption


def test_the_error_is_that_of_the_runs_and_begins_with_the_same_images_unattacked(runs, draw):
    axes = panel(draw(UNDER_PGD), "standard: gates of the source")
    assert len(lines(axes, RUN)) == 3 * 3 and len(lines(axes, MEAN)) == 3  # dense, E2, E8
    arm = runs.arms[2]
    means = {line.get_label(): line for line in lines(axes, MEAN)}
    assert list(means) == ["dense", "E2", "E8"]
    np.testing.assert_array_equal(means["E8"].get_xdata(), [0, 2, 4, 8, 16])
    clean = [np.mean(row[:40]) for row in runs.images("standard", arm, "clean").values()]
    held = [np.mean(list(runs.values("standard", arm, f"pgd@{r}").values())) for r in (2, 4, 8, 16)]
    expected = 100 * (1 - np.array([np.mean(clean), *held]))
    np.testing.assert_allclose(means["E8"].get_ydata(), expected)
    assert "at 8/255 mean errors are" in UNDER_PGD.caption(runs)


def test_a_mean_is_of_the_runs_that_have_every_number(made_up):
    study = made_up(("dense", "E2", "E8"))
    arm = study.arms[2]
    study.rows[-1].values["auc"] = math.nan  # E8, seed 2
    runs = runs_of(study)
    axes = panel(OVER_EXPERTS.drawn(runs), "standard: PGD, mean over radii")
    (source, dense) = lines(axes, MEAN)
    known = runs.values("standard", arm, "auc")
    assert set(known) == {0, 1}
    first = runs.values("standard", study.arms[1], "auc")
    np.testing.assert_allclose(
        source.get_ydata(), [50 * (first[0] + first[1]), 50 * (known[0] + known[1])]
    )
    assert len(lines(axes, RUN)) == 3 + 3  # the third has one point
    assert dense.get_label() == "dense"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["dense", "2", "8"]


def test_without_a_whole_run_there_is_no_mean():
    _, axes = plt.subplots()
    arm = Arm("E2", 2, 2)
    look = looks([arm])["E2"]
    assert run_lines(axes, [0, 1], {0: [1.0, math.nan], 1: [math.nan, 2.0]}, look)
    assert len(lines(axes, RUN)) == 2 and not lines(axes, MEAN)
    assert axes.get_legend_handles_labels()[1] == ["E2"]
    assert not run_lines(axes, [0, 1], {0: [math.nan, math.nan]}, look)


def test_lines_of_equal_numbers_show_one_inside_the_other(draw):
    axes = panel(draw(UNDER_PGD), "standard: gates of the source")
    means = lines(axes, MEAN)
    for one, other in combinations(means, 2):
        assert one.get_markersize() > other.get_markersize()
        assert one.get_linewidth() > other.get_linewidth()
        assert one.get_marker() != other.get_marker()
    assert all(line.get_markerfacecolor() == "none" for line in means)


@pytest.mark.parametrize("figure", [UNDER_PGD, SLOPES], ids=lambda figure: figure.name)
def test_legends_lie_outside_of_all_panels(draw, figure):
    drawn = draw(figure)
    drawn.savefig(BytesIO(), dpi="figure")  # decides the layout
    legends = [axes.get_legend() for axes in drawn.axes if axes.get_legend()] + drawn.legends
    assert legends
    for legend in legends:
        box = legend.get_window_extent()
        assert (
            drawn.bbox.containsx(box.x0) and drawn.bbox.y0 - 1 <= box.y0 and box.x1 < drawn.bbox.x1
        )
        assert not any(box.overlaps(axes.get_window_extent()) for axes in drawn.axes)
    heights = [axes.get_window_extent().height / drawn.dpi for axes in drawn.axes]
    assert min(heights) > 1.7  # inches, with a legend below or without


def test_differences_are_paired_by_seed_and_image(runs, draw):
    dense, arm = runs.arms[0], runs.arms[2]
    table = differences(runs, "standard", arm, dense, "pgd@8")
    assert table.shape == (3, 40)
    one, other = (runs.images("standard", each, "pgd@8") for each in (arm, dense))
    np.testing.assert_array_equal(table[1], 100 * np.subtract(other[1], one[1]))
    axes = panel(draw(ERROR_AGAINST_DENSE), "standard: gates of the source")
    assert len(lines(axes, MEAN)) == 2 * 4  # E2 and E8 at four radii
    assert sum(len(line.get_ydata()) for line in lines(axes, RUN)) == 2 * 4 * 3
    assert lines(axes, MEAN)[6].get_ydata()[0] == pytest.approx(table.mean())  # E8 at 8/255
    assert differences(runs, "standard", arm, dense, "pgd@3") is None


def test_interventions_are_compared_with_the_own_choice_of_the_same_run(runs, draw):
    arm = runs.arms[2]
    own = runs.values("standard", arm, "none:clean")
    steered = runs.values("standard", arm, "drop best:clean")
    expected = [100 * (steered[seed] - own[seed]) for seed in range(3)]
    assert accuracy_changes(runs, "standard", arm, "drop best", "clean") == pytest.approx(expected)
    axes = panel(draw(INTERVENTIONS), "standard: clean images")
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "drop best" and "none" not in names and len(names) == 9
    assert len(lines(axes, RUN)) == len(lines(axes, MEAN)) == 9 * len(few(runs.arms))
    np.testing.assert_allclose(lines(axes, RUN)[0].get_xdata(), expected)


def test_captions_count_images_in_the_data(runs):
    assert "on 200 clean images and on 30 after PGD" in INTERVENTIONS.caption(runs)
    assert "PGD with 20 steps on 40 images" in UNDER_PGD.caption(runs)
    assert runs.image_count("swap") == 25 and runs.image_count("nothing") == 0


def test_routing_has_a_panel_for_each_layer_and_its_floor(runs, draw):
    drawn = draw(ROUTING_CHANGE)
    axes = panel(drawn, "standard, gates of the source:\nblocks.2.mlp")
    assert len(lines(axes, "noise")) == 2  # E2, E8
    mean = lines(axes, MEAN)[1]
    arm = runs.arms[2]
    change = runs.values("standard", arm, "routing@16:kept:blocks.2.mlp")
    assert mean.get_ydata()[0] == 0
    assert mean.get_ydata()[-1] == pytest.approx(100 * np.mean(list(change.values())))


def test_of_many_layers_four_are_drawn_and_it_is_said(made_up):
    study = made_up(("E8",), seeds=1)
    for run in study.rows:
        for layer in range(6):
            for radius in (0, 2, 4, 8, 16):
                run.values[f"routing@{radius}:kept:more.{layer}"] = 0.1
    runs = runs_of(study)
    assert shown_layers(runs, "standard") == ["blocks.1.mlp", "more.0", "more.3", "more.5"]
    assert len(ROUTING_CHANGE.drawn(runs).axes) == 4
    assert "4 of 8 layers are drawn" in ROUTING_CHANGE.caption(runs)


def test_models_are_compared_within_their_seed(runs, draw):
    points = of_models(runs, "standard")
    assert list(points) == [0, 1, 2] and len(points[0]) == len(NAMES) - 1  # without dense
    axes = panel(draw(TOP_EXPERTS), "standard: models")
    assert len(lines(axes, RUN)) == 3 and len(lines(axes, MEAN)) == 1
    around = np.array(list(points[0].values()))
    around = around - around.mean(0)
    slope = (around[:, 0] @ around[:, 1]) / (around[:, 0] @ around[:, 0])
    (x0, x1), (y0, y1) = lines(axes, RUN)[0].get_data()
    assert (y1 - y0) / (x1 - x0) == pytest.approx(slope)


def test_pairs_of_images_have_both_numbers_above_zero():
    x, y = known_pairs([1.0, math.nan, 2.0, 0.0, 5.0], [3.0, 1.0, math.inf, 1.0])
    assert (x.tolist(), y.tolist()) == ([1.0], [3.0])


def test_images_without_a_swap_are_counted_and_have_none(made_up):
    assert share_within([0.1, math.nan, 0.3, 0.2], [0.05, 0.2, 9]) == [0, 50, 75]
    runs = runs_of(made_up(("dense", "E2"), seeds=2))  # K = E
    drawn = SWAPS.drawn(runs)
    assert drawn is None and SWAPS.reason(runs) == "there is no arm with finite numbers"


def test_a_panel_without_numbers_says_so(made_up):
    study = made_up(("dense", "E8"), seeds=2)
    for run in study.rows:
        run.values["jacobian"] = math.nan
    drawn = SMOOTHNESS.drawn(runs_of(study))
    axes = panel(drawn, "standard: Jacobian")
    assert [text.get_text() for text in axes.texts] == ["not measured"] and not axes.axison
    assert not panel(drawn, "standard: first-order radius").texts


def test_a_training_without_numbers_has_no_line_of_panels(made_up):
    study = made_up(("dense", "E8"), trainings=("standard", "pgd-at"))
    for run in study.rows:
        if run.training == "pgd-at":
            for name in ("r1", "jacobian", "least_eps"):
                run.values.pop(name)
    titles = [axes.get_title(loc="left") for axes in SMOOTHNESS.drawn(runs_of(study)).axes]
    assert len(titles) == 3 and all(title.startswith("standard: ") for title in titles)


@pytest.mark.parametrize("figure", OF_RUNS, ids=lambda figure: figure.name)
def test_runs_without_any_number_have_no_figure(made_up, figure):
    study = made_up(("dense", "E8"), seeds=2)
    rows = [run._replace(values={"clean": 0.9}, images={}) for run in study.rows]
    runs = StudyRuns(rows, study.arms, study.facts)
    assert figure.drawn(runs) is None
    assert figure.reason(runs).startswith("no run has “")


def test_reasons_why_a_figure_is_not_there(made_up):
    def reason(names):
        runs = runs_of(made_up(names, seeds=1))
        figure = next(each for each in FIGURES if each.name == "robustness-over-k")
        return figure.drawn(runs), figure.reason(runs)

    assert reason(("dense",)) == (None, "no arm has experts")
    assert reason(("dense", "E2", "E8")) == (
        None,
        "there is no pair of arms that differ in K alone",
    )
    alone = runs_of(made_up(("E8",), seeds=1))
    assert ERROR_AGAINST_DENSE.drawn(alone) is None
    assert "a dense one of the same seed" in ERROR_AGAINST_DENSE.reason(alone)


@pytest.mark.parametrize("figure", OF_RUNS, ids=lambda figure: figure.name)
def test_one_run_an_arm_is_called_so(made_up, figure):
    caption = figure.caption(runs_of(made_up(("dense", "E8", "E8-K1"), seeds=1)))
    assert "There is one run an arm" in caption or "1 run an arm" in caption


def test_arms_of_a_user_stand_in_groups_by_gates_and_cost():
    dense, odd = Arm("plain"), Arm("odd", 6, 3, True)
    arms = [dense, Arm("a", 4, 2), Arm("b", 16, 2), odd, Arm("wide", 16, 1, False, True)]
    groups = at_equal_cost(arms)
    assert [(group.title, [arm.name for arm in group.arms]) for group in groups] == [
        ("gates of the source", ["plain", "a", "b"]),
        ("gates that sum to 1", ["plain", "odd"]),
    ]
    assert [arm.name for arm in few(arms)] == ["a", "odd", "b"]
    assert [group.title for group in at_equal_cost([dense])] == ["dense"]
    all_taken = [dense, Arm("c", 2, 2), Arm("a", 4, 2)]  # c is in both ladders
    assert [group.title for group in at_equal_cost(all_taken)] == ["gates of the source"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.8, 1300, [1, 10, 100, 1000]),
        (5.4, 15.6, [7, 10, 15]),
        (0.0043, 0.0083, [0.005, 0.006, 0.007, 0.008]),
        (0.88, 1.66, [1.0, 1.2, 1.4, 1.6]),
        (0.84, 1.58, [1.0, 1.2, 1.4]),
        (2.01, 5.03, [3, 4, 5]),
        (1e-11, 2e-3, [1e-11, 1e-9, 1e-7, 1e-5, 1e-3]),
    ],
)
def test_logarithmic_axes_have_round_numbers(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("numbers", [[7.3], [7.3, 7.3001]])
def test_numbers_that_hardly_differ_have_a_logarithmic_axis(numbers):
    _, axes = plt.subplots()
    axes.plot(numbers, numbers, "o")
    log_axis(axes, "y")
    low, high = axes.get_ylim()
    assert low < 7.3 < high and len(axes.get_yticks()) >= 3
    assert all(low <= tick <= high for tick in axes.get_yticks())


def test_names_of_figures_differ():
    assert all(isinstance(figure, StudyFigure) for figure in FIGURES)
    assert (
        len({figure.name for figure in FIGURES}) == len({f.title for f in FIGURES}) == len(FIGURES)
    )


def test_the_case_that_the_paper_proves_is_drawn_with_its_bound():
    drawn = CLUSTERS.draw(None)
    for axes in drawn.axes:
        runs, means = (
            [each for each in axes.lines if each.get_gid() == gid] for gid in (RUN, MEAN)
        )
        bounds = [each for each in axes.lines if each.get_gid() not in (RUN, MEAN)]
        assert len(means) == len(bounds) == 4 and len(runs) == 4 * 5
        for place, bound in enumerate(bounds):
            assert bound.get_ydata()[0] == pytest.approx([2, 4, 8, 16][place] ** 0.5)
            for run in runs[5 * place : 5 * place + 5]:
                assert (np.array(run.get_ydata()) <= np.array(bound.get_ydata()) + 1e-9).all()
                assert (np.array(run.get_ydata()) >= 1 - 1e-9).all()
    assert "1.41 with 2, 2.00 with 4, 2.83 with 8, 4.00 with 16" in CLUSTERS.caption(None)
    plt.close(drawn)
