"""What a report of ``ironmoe attack`` says, counted by hand on five images."""

import io
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.collections import FillBetweenPolyCollection
from rich.console import Console

from ironmoe.attacks import AttackSummary, Flag, Proportion, RobustnessReport
from ironmoe.attacks.data import ImageArrays, ImageStream, Preprocessing
from ironmoe.bench.attack import curves as evaluation_curves
from ironmoe.bench.attack import table as evaluation_table
from ironmoe.bench.attack.afterwards import margins_left
from ironmoe.bench.attack.attacked_images import AttackedImages
from ironmoe.bench.attack.outcome import EvaluationOutcome, ShownImage
from ironmoe.bench.attack.parts import Part
from ironmoe.bench.attack.pictures import draw_evaluation
from ironmoe.bench.attack.saved.image_arrays import image_arrays
from ironmoe.bench.attack.saved.tables import image_rows
from ironmoe.bench.attack.strips import examples
from ironmoe.bench.attack.suite import Suite
from ironmoe.bench.attack.words import images_told, told_verdict, words
from ironmoe.bench.reports.style import save_picture
from ironmoe.bench.reports.tables import print_table


def summary(
    passed,
    fell,
    *,
    clean=(1, 1, 1, 1, 0),
    decided=(1, 1, 1, 1, 1),
    distance=None,
    steps=None,
    images=None,
    parts=("a", "b"),
    labels=(0, 0, 0, 0, 0),
):
    """Of five images under an attack of two parts at eps 1/255 and 2/255."""
    stages = tuple((eps / 255, part) for eps in (1, 2) for part in parts)
    of = {"clean_correct": clean, "fell": fell, "decided": decided, "found": fell}
    return AttackSummary(
        stages=stages,
        examples=torch.arange(5),
        **{name: torch.tensor(values).bool() for name, values in of.items()},
        passed=torch.tensor(passed),
        prediction=torch.tensor([1, 1, 1, 1, 1]),
        distance=torch.tensor(distance or [0.0] * 5, dtype=torch.float64),
        steps=torch.tensor(steps or [1] * 5),
        adversarial=torch.rand(5, 1, 2, 2) if images is None else images,
        flags={name: torch.zeros(5, dtype=torch.bool) for name in ("zero_gradient", "loss_rising")},
        forwards=30,
        backwards=10,
        norm="Linf",
        per_image={"label": torch.tensor(labels)},
    )


def outcome(attacks, margins=None, complete=True, checks=(), classes=("no", "yes"), max_queries=10):
    report = RobustnessReport(
        next(iter(attacks.values())).clean_correct, attacks, list(checks), 8.0, complete
    )
    parts = {
        name: (
            Part("a", 10, 1, 0, 1, max_queries),
            Part("b", 10 * (n + 1), 1, 0, 1, max_queries * (n + 1)),
        )
        for n, name in enumerate(attacks)
    }
    suite = Suite(tuple(attacks), eps_255=(1, 2))
    return EvaluationOutcome(
        "toy", report, suite, parts, some_images(range(50, 55), classes), margins, []
    )


def some_images(rows, classes=("no", "yes")):
    """Random images that lie at these rows of a set."""
    values = torch.rand(60, 1, 2, 2).numpy()
    arrays = ImageArrays("toy", values, np.zeros(60, dtype=int), fingerprint="", origin="toy")
    stream = ImageStream(arrays, Preprocessing(channels=1), rows=torch.tensor(rows))
    return AttackedImages(stream, (1, 2, 2), list(classes), [], "toy", "")


@pytest.fixture
def two():
    """Image 0 falls to x's part b at eps 1 and to y's a at eps 2; image 1 to x's a at eps 2; 2 to
    y's b at eps 1; 3 holds; 4 is wrong."""
    x = summary(
        [1, 2, 4, 4, 0],
        [1, 1, 0, 0, 0],
        distance=[0.003, 0.005, 0.0, 0.0, 0.0],
        steps=[9, 4, -1, -1, -1],
    )
    y = summary(
        [2, 4, 1, 4, 0],
        [1, 0, 1, 0, 0],
        distance=[0.004, 0.0, 0.002, 0.0, 0.0],
        steps=[5, -1, 7, -1, -1],
    )
    return {"x": x, "y": y}


def test_counts_by_hand(two):
    made = outcome(two)
    assert [(r.attack, r.eps_255, r.robust.count, r.fell, r.undecided) for r in made.rows] == [
        ("x", 1, 3, 1, 0), ("x", 2, 2, 2, 0), ("y", 1, 3, 1, 0), ("y", 2, 2, 2, 0),
        ("", 1, 2, 2, 0), ("", 2, 1, 3, 0)
    ]  # fmt: skip
    assert made.worst_case(2).total == 5
    assert made.stages("x") == {"a": [0, 1], "b": [1, 0]} and made.stages("y") == {
        "a": [0, 1],
        "b": [1, 0],
    }
    assert made.attempted("x") == {"a": [4, 3], "b": [4, 2]}
    assert outcome({"x": summary([0] * 5, [0] * 5, parts=("a",))}).stages("x") == {}
    cost = made.cost("x")
    assert (cost.found, cost.confirmed, cost.forwards, cost.backwards) == (2, 2, 30, 10)
    # Forty passes, five of them over the clean images, of which four are right.
    assert cost.images_per_second == 4 / (8 * 35 / 70)


def test_what_asked_or_decided_nothing_has_no_speed(two):
    """y: the clean pass alone; or passes, but nothing decided of what is right from the start."""
    two["y"] = replace(summary([0] * 5, [0] * 5, decided=[0, 0, 0, 0, 1]), forwards=5, backwards=0)
    made = outcome(two, complete=False)
    assert made.cost("y").images_per_second is None and made.cost("x").images_per_second == 4 / 8
    two["y"] = summary([0] * 5, [0] * 5, decided=[0, 0, 0, 0, 1])
    assert outcome(two, complete=False).cost("y").images_per_second is None
    assert [row[3] for row in evaluation_table.costs(outcome(two, complete=False))] == ["1", "–"]


def test_each_verdict_says_of_which_image_it_is(two):
    """A budget left the evaluation with the images 0, 1, 2, 3 and 6 of 7, which lie at 50 … 56 in
    the data."""
    examined = torch.tensor([0, 1, 2, 3, 6])
    labels = {"label": torch.tensor([0, 1, 0, 1, 1])}
    two = {name: replace(one, examples=examined, per_image=labels) for name, one in two.items()}
    made = outcome(two)
    made.images = some_images(range(50, 57))
    arrays = image_arrays(image_rows(made))
    assert arrays["number"].tolist() == arrays["index"].tolist() == examined.tolist()
    assert arrays["row"].tolist() == [50, 51, 52, 53, 56]
    assert arrays["label"].tolist() == [0, 1, 0, 1, 1]
    assert arrays["x/fell"].tolist() == [True, True, False, False, False]
    assert np.array_equal(255 * arrays["x/eps"], [1, 2] + 3 * [math.nan], equal_nan=True)
    axes = examples(made, [ShownImage(4, "x", 2.0)]).axes
    assert (
        np.array_equal(axes[0].images[0].get_array(), made.images.at([6])[0][0, 0])
        and axes[0].get_title() == "image 6\nyes"
    )
    plt.close("all")


def test_undecided_by_hand(two):
    """y was ended before image 1 had met eps 2, and before image 3 had met eps 1. What x found
    still counts."""
    two["y"] = summary([2, 2, 1, 1, 0], [1, 0, 1, 0, 0], decided=[1, 0, 1, 0, 1])
    made = outcome(two, complete=False)
    assert [row.undecided for row in made.rows] == [0, 0, 1, 2, 1, 1]
    assert any("2 of 10 (image, attack) pairs are undecided" in line for line in words(made))
    row = made.worst_rows[0]  # two stand, and one of them may still fall
    assert row.robust.count == 2 and (row.share, row.least) == ("20.0 to 40.0 %", 0.2)
    assert row.numbers["value"] is None and row.numbers["undecided"] == 1
    assert row.interval == (Proportion(1, 5).interval()[0], Proportion(2, 5).interval()[1])
    assert row.brackets == "[3.6, 76.9]" and outcome({"x": two["x"]}).rows[0].share == "60.0 %"


def test_what_is_undecided_is_hatched_and_what_decided_nothing_not_drawn(two):
    two["y"] = summary([0] * 5, [0] * 5, decided=[0, 0, 0, 0, 1])
    made = outcome(two, complete=False)
    (axes,) = evaluation_curves.accuracy(made).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["x", "worst case"]
    # x is decided; the worst case is not
    areas = [area for area in axes.collections if isinstance(area, FillBetweenPolyCollection)]
    assert [area.get_hatch() for area in areas] == [None, "///"]
    (_, what, *_), *_ = draw_evaluation(made).values()
    assert "Hatched" in what and "nothing was decided: y" in what
    # one way to tell it, in the command, in Python and in the table of a paper
    row = evaluation_table.results(made)[2]
    assert row[2].startswith("0.0 to 80.0 % [") and row[2][:13] in str(made.report)
    plt.close("all")


def test_easiest_and_hardest_by_hand(two):
    margins = torch.tensor([[math.nan] * 3 + [0.5, math.nan], [math.nan] * 3 + [0.2, math.nan]])
    made = outcome(two, margins)
    assert [
        (shown.number, shown.attack, round(shown.fell_at_255)) for shown in made.easiest(2)
    ] == [(2, "y", 1), (0, "x", 1)]
    assert [(s.number, s.attack) for s in made.hardest()] == [(3, "y")]
    assert [(s.number, s.attack) for s in made.hardest(2)] == [(3, "y"), (1, "x")]
    assert made.hardest()[0].fell_at_255 == math.inf and made.hardest()[0].margin == pytest.approx(
        0.2
    )
    below = [
        axes.get_xlabel() for axes in examples(made, [*made.hardest(), *made.easiest(1)]).axes[-2:]
    ]
    assert below == [
        "y\nheld at ≤ 2/255\nmargin left 0.2",
        "y\nfell at 1/255\nat 0.51/255, 7 questions",
    ]
    plt.close("all")


def test_no_image_is_both_easy_and_hard(two):
    made = outcome(two)
    assert [shown.number for shown in made.easiest(2)] == [2, 0] and [
        shown.number for shown in made.hardest(2)
    ] == [1]
    assert made.hardest() == []  # the easiest six are all that fell


def test_margins_are_those_of_held_images_in_their_final_images():
    model = torch.nn.Flatten()  # four pixels, four logits
    images = torch.arange(5.0).view(5, 1, 1, 1) * torch.tensor([1.0, 0.25, 0.0, 0.0]).view(
        1, 1, 2, 2
    )
    x = summary([4, 4, 4, 4, 0], [0, 0, 1, 0, 0], images=images, decided=[1, 1, 1, 0, 1])
    y = summary([4, 4, 4, 4, 0], [0, 0, 0, 0, 0], images=images / 2)
    report = RobustnessReport(x.clean_correct, {"x": x, "y": y})
    margins = margins_left(model, report, torch.zeros(5, dtype=torch.int64), 2)
    nan = math.nan
    assert torch.equal(
        margins.nan_to_num(-1),
        torch.tensor([[0, 0.75, nan, nan, nan], [0, 0.375, nan, nan, nan]]).nan_to_num(-1),
    )


def test_words_say_what_tripped_and_what_was_found(two):
    checks = [
        Flag("fine", False, 0.0, "All is well."),
        Flag.not_looked_at("batch dependence", "one image has no company"),
        Flag("zero gradients", True, 0.5, "Half stand still."),
    ]
    made = outcome(two, checks=checks, classes=range(10))
    assert [flag.name for flag in made.checks] == ["zero gradients", "batch dependence", "fine"]
    said = words(made)
    assert (
        "1 of 3 checks" in said[0]
        and "Zero gradients: Half stand still." in said[0]
        and "All is well" not in said[0]
    )
    assert said[1].startswith("1 of 3 checks against false security could not be made")
    assert "Batch dependence: Not looked at: one image has no company." in said[1]
    assert "1 check against false security tripped (zero gradients)" in told_verdict(made)
    assert any(
        "The search reported successes for 4 (image, attack) pairs, and 4 were confirmed" in line
        for line in said
    )
    assert not any("budget" in line or "chance" in line for line in said)
    said = words(outcome(two, classes=range(10)))
    assert said[0] == "The checks against false security were not made."
    one = words(outcome({"x": summary([1, 4, 4, 4, 0], [1, 0, 0, 0, 0])}))
    assert any("a success for one image, and it was confirmed" in line for line in one)
    few_right = summary([0] * 5, [0] * 5, clean=[1, 1, 0, 0, 0], labels=(0, 1, 0, 1, 0))
    made = outcome({"x": few_right})
    assert "40.0 % [11.8, 76.9], is at or below chance, 50 % for 2 classes" in words(made)[0]
    assert "not told from chance, so this says nothing" in told_verdict(made)
    made = outcome({"x": replace(few_right, skipped=torch.ones(5, dtype=torch.bool))})
    assert not any("chance" in line for line in [*words(made), told_verdict(made)])


def test_an_interval_that_reaches_chance_is_told_beside_a_share_above_it(two):
    made = outcome(two)
    assert "80.0 % [37.6, 96.4], cannot be told from chance, 50 % for 2" in words(made)[0]
    assert "not told from chance, so this says nothing" in told_verdict(made)


def test_pictures_show_the_numbers(two):
    made = outcome(two)
    (axes,) = evaluation_curves.accuracy(made).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert {name: list(lines[name]) for name in ("x", "y", "worst case")} == {
        "x": [60, 40],
        "y": [60, 40],
        "worst case": [40, 20],
    }
    for axes, name in zip(evaluation_curves.distances(made).axes, two, strict=True):
        assert sum(bar.get_height() for bar in axes.patches) == 2 and name in axes.get_title(
            loc="left"
        )
        assert all(tick == int(tick) for tick in axes.get_yticks())
    (axes,) = evaluation_curves.steps(made).axes
    curves = [line.get_data() for line in axes.get_lines()]
    assert [list(curves[0][0]), list(curves[0][1])] == [[0, 4, 9, 10], [0, 25, 50, 50]]
    # marks where the longest attempt ends, of each attack
    assert [list(curves[1][0]), list(curves[3][0])] == [[10], [20]]
    assert list(axes.get_xticks()) == [0, 1, 2, 5, 10, 20] and axes.get_xlim()[1] > 20
    plt.close("all")


def test_any_class_name_can_be_drawn(two, tmp_path):
    """Neither mathematics nor what the font lacks is an error or a warning."""
    made = outcome(two, classes=["$x_{", "猫 😀"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_picture(examples(made, made.easiest()), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_tables_fit_a_narrow_terminal(two):
    long = {"autoattack-rand": two["x"], "apgd-dlr": two["y"], "autoattack-plus": two["x"]}
    made = outcome(long, complete=False)
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    for table in (evaluation_table.results_table(made), evaluation_table.costs_table(made)):
        print_table(table, console)
    text = console.export_text()
    assert "…" not in text and text.count("autoattack-rand") == text.count("autoattack-plus") == 2
    assert max(map(len, text.splitlines())) <= 80
    assert (
        'Model "toy" under attack in Linf on 5 images: autoattack-rand (a: steps 10'
        in evaluation_table.heading(made)[0]
    )


def test_nothing_found_and_nothing_right_still_make_a_report(two):
    nothing = outcome({"x": summary([4] * 4 + [0], [0] * 5)})
    assert list(draw_evaluation(nothing)) == ["robust_accuracy.png"]
    wrong = outcome({"x": summary([0] * 5, [0] * 5, clean=[0] * 5)}, torch.full((1, 5), math.nan))
    assert list(draw_evaluation(wrong)) == ["robust_accuracy.png"]
    assert wrong.worst_case(1).count == 0 and wrong.easiest() == wrong.hardest() == []
    everything = torch.ones(5, dtype=torch.bool)
    none_counts = replace(summary([0] * 5, [0] * 5, clean=[0] * 5), skipped=everything)
    assert draw_evaluation(outcome({"x": none_counts})) == {}
    plt.close("all")


def test_the_seed_of_the_attack_is_no_seed_of_the_model(two):
    made = outcome(two)
    layers = {"mlp": {"change": 0.1, "load_clean": [0.5, 0.5], "load_adversarial": [0.6, 0.4]}}
    made.routing = [{"eps_255": eps, "images": 3, "layers": layers} for eps in (1, 2)]
    assert draw_evaluation(made)["expert_load.png"][2].axes[0].get_title() == "Expert load"
    plt.close("all")


def test_the_head_counts_the_images_of_the_figures_and_says_why_others_are_left_out(two):
    made = outcome(two)
    assert images_told(made) == "5 images"
    skipped = torch.tensor([True, False, False, True, False])
    columns = {"forwards": torch.tensor([1, 9, 9, 1, 1])}
    some = {name: replace(one, skipped=skipped, per_image=columns) for name, one in two.items()}
    made = outcome(some)
    assert images_told(made) == "3 of 5 images (2 skipped: 2 gave nothing finite)"
    made.unread = {3: "cannot be read"}
    expected = "3 of 5 images (2 skipped: 1 cannot be read, 1 gave nothing finite)"
    assert images_told(made) == expected and expected in evaluation_table.heading(made)[0]
    assert sum(row.robust.total for row in made.rows) == 3 * len(made.rows)
    made.images = some_images(range(50, 57))
    told = "3 of 7 images (4 left out: 1 cannot be read, 1 gave nothing finite, 2 not reached)"
    assert images_told(made) == told

    columns["forwards"][0] = 4
    told = "3 of 5 images (2 skipped: 1 gave nothing finite, 1 gave nothing finite under attack"
    made = outcome(some)
    assert images_told(made) == f"{told} alone)"
    assert any("1 of them is finite without an attack" in line for line in words(made))


def test_the_verdict_stands_above_the_tables_and_names_radius_and_norm(two):
    _, radii, verdict, _ = evaluation_table.heading(outcome(two))
    assert radii.startswith("eps (Linf): 1/255 = ")
    assert "40.0 % at 1/255 and 20.0 % at 2/255 under x and y in Linf" in verdict
