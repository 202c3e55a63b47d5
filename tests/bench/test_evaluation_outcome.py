"""What a report of ``ironmoe attack`` says, counted by hand on five images."""

import math

import pytest
import torch
from matplotlib import pyplot as plt

from ironmoe.attacks import AttackSummary, Flag, RobustnessReport
from ironmoe.bench import evaluation_plots
from ironmoe.bench.attack_suite import Suite
from ironmoe.bench.evaluation_outcome import Outcome, margins_left


def summary(
    passed, fell, *, clean=(1, 1, 1, 1, 0), decided=(1, 1, 1, 1, 1), distance=None, steps=None, images=None, parts=("a", "b")
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
        adversarial=images,
        flags={name: torch.zeros(5, dtype=torch.bool) for name in ("zero_gradient", "loss_rising")},
        forwards=30,
        backwards=10,
    )


def outcome(attacks, margins=None, complete=True, checks=()):
    report = RobustnessReport(next(iter(attacks.values())).clean_correct, attacks, list(checks), 8.0, complete)
    images, labels = torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64)
    return Outcome("toy", report, Suite(tuple(attacks), eps_255=(1, 2)), 8.0, images, labels, ["no", "yes"], margins, [])


@pytest.fixture
def two():
    """Image 0 falls to x's part b at eps 1 and to y's a at eps 2; image 1 to x's a at eps 2; 2 to y's b at eps 1; 3 holds; 4 is wrong."""
    x = summary([1, 2, 4, 4, 0], [1, 1, 0, 0, 0], distance=[0.003, 0.005, 0.0, 0.0, 0.0], steps=[9, 4, -1, -1, -1])
    y = summary([2, 4, 1, 4, 0], [1, 0, 1, 0, 0], distance=[0.004, 0.0, 0.002, 0.0, 0.0], steps=[5, -1, 7, -1, -1])
    return {"x": x, "y": y}


def test_counts_by_hand(two):
    made = outcome(two)
    assert [(r.attack, r.eps_255, r.robust.count, r.fell, r.undecided) for r in made.rows] == [
        ("x", 1, 3, 1, 0), ("x", 2, 2, 2, 0), ("y", 1, 3, 1, 0), ("y", 2, 2, 2, 0), ("", 1, 2, 2, 0), ("", 2, 1, 3, 0)
    ]  # fmt: skip
    assert made.worst_case(2).total == 5
    assert made.stages("x") == {"a": [0, 1], "b": [1, 0]} and made.stages("y") == {"a": [0, 1], "b": [1, 0]}
    assert outcome({"x": summary([0] * 5, [0] * 5, parts=("a",))}).stages("x") == {}
    cost = made.cost("x")
    assert (cost.found, cost.confirmed, cost.forwards, cost.backwards) == (2, 2, 30, 10)
    assert cost.images_per_second == 5 / (8 * 40 / 80)


def test_undecided_by_hand(two):
    """y was ended before image 1 had met eps 2, and before image 3 had met eps 1. What x found still counts."""
    two["y"] = summary([2, 2, 1, 1, 0], [1, 0, 1, 0, 0], decided=[1, 0, 1, 0, 1])
    made = outcome(two, complete=False)
    assert [row.undecided for row in made.rows] == [0, 0, 1, 2, 1, 1]
    assert any("2 of 10 (image, attack) pairs are undecided" in line for line in made.words())


def test_easiest_and_hardest_by_hand(two):
    margins = torch.tensor([[math.nan] * 3 + [0.5, math.nan], [math.nan] * 3 + [0.2, math.nan]])
    made = outcome(two, margins)
    assert [(shown.number, shown.attack, round(shown.fell_at_255)) for shown in made.easiest(2)] == [(2, "y", 1), (0, "x", 1)]
    assert [(s.number, s.attack) for s in made.hardest()] == [(3, "y"), (1, "x"), (0, "x"), (2, "y")]
    assert made.hardest()[0].fell_at_255 == math.inf


def test_margins_are_those_of_held_images_in_their_final_images():
    model = torch.nn.Flatten()  # four pixels, four logits
    images = torch.arange(5.0).view(5, 1, 1, 1) * torch.tensor([1.0, 0.25, 0.0, 0.0]).view(1, 1, 2, 2)
    x = summary([4, 4, 4, 4, 0], [0, 0, 1, 0, 0], images=images, decided=[1, 1, 1, 0, 1])
    y = summary([4, 4, 4, 4, 0], [0, 0, 0, 0, 0], images=images / 2)
    report = RobustnessReport(x.clean_correct, {"x": x, "y": y})
    margins = margins_left(model, report, torch.zeros(5, dtype=torch.int64), 2)
    nan = math.nan
    assert torch.equal(
        margins.nan_to_num(-1), torch.tensor([[0, 0.75, nan, nan, nan], [0, 0.375, nan, nan, nan]]).nan_to_num(-1)
    )


def test_words_say_what_tripped_and_what_was_found(two):
    checks = [Flag("fine", False, 0.0, "All is well."), Flag("zero gradients", True, 0.5, "Half stand still.")]
    made = outcome(two, checks=checks)
    assert [flag.name for flag in made.checks] == ["zero gradients", "fine"]
    words = made.words()
    assert "1 of 2 checks" in words[0] and "Zero gradients: Half stand still." in words[0] and "All is well" not in words[0]
    assert any("took 4 (image, attack) pairs for successes; 4 of them were confirmed" in line for line in words)
    assert not any("budget" in line for line in words)


def test_pictures_show_the_numbers(two):
    made = outcome(two)
    (axes,) = evaluation_plots.accuracy(made).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert list(lines["x"]) == [80, 60, 40] and list(lines["y"]) == [80, 60, 40] and list(lines["worst case"]) == [80, 40, 20]
    for axes, name in zip(evaluation_plots.distances(made).axes, two, strict=True):
        assert sum(bar.get_height() for bar in axes.patches) == 2 and name in axes.get_legend().get_texts()[0].get_text()
    (axes,) = evaluation_plots.steps(made).axes
    x, y = axes.get_lines()[0].get_data()
    assert list(x) == [0, 4, 9, 9] and list(y) == [0, 25, 50, 50]
    plt.close("all")


def test_nothing_found_and_nothing_right_still_make_a_report(two):
    nothing = outcome({"x": summary([4] * 4 + [0], [0] * 5)})
    assert list(evaluation_plots.draw_evaluation(nothing)) == ["robust_accuracy.png"]
    wrong = outcome({"x": summary([0] * 5, [0] * 5, clean=[0] * 5)}, torch.full((1, 5), math.nan))
    assert list(evaluation_plots.draw_evaluation(wrong)) == ["robust_accuracy.png"]
    assert wrong.worst_case(1).count == 0 and wrong.easiest() == wrong.hardest() == []
    plt.close("all")
