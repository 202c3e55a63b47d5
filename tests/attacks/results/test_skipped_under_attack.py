"""Images that an attack drove to NaN: no table and no comparison drops them in silence."""

import csv
import io

import pytest
import torch
from torch import nn

from ironmoe.attacks import (
    FGSM,
    PGD,
    Square,
    accuracies,
    compare,
    csv_table,
    evaluate,
    latex_table,
    per_image,
)
from ironmoe.attacks.results.rows_file import rows_as_text

SMALL, LARGE = 0.01, 0.1
FROM_THE_START, NEAR, FAR = [0, 1], [2, 3, 4], [5, 6]


class Breaking(nn.Module):
    """A linear model that gives NaN where the first pixel is below a border."""

    def __init__(self, border=0.2, noise=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 3)
        self.border, self.noise = border, noise

    def forward(self, x):
        logits = self.linear(x.flatten(1))
        logits = logits + self.noise * torch.rand_like(logits)
        return torch.where(x.flatten(1)[:, :1] < self.border, float("nan"), logits)


def data():
    x = 0.35 + 0.6 * torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    x[FROM_THE_START, 0, 0, 0] = 0.1
    x[NEAR, 0, 0, 0] = 0.2001
    x[FAR, 0, 0, 0] = 0.25
    return x, Breaking().linear(x.flatten(1)).argmax(1)


def made(model, attacks=None, **options):
    """PGD starts at random points, so it meets the border; FGSM at a small radius may miss it."""
    attacks = attacks or {"pgd": PGD(model, steps=3, restarts=4), "square": Square(model, steps=5)}
    options = {"eps": [SMALL, LARGE], "on_bad": "skip", "checks": False} | options
    return evaluate(model, data(), attacks, **options)


@pytest.fixture(scope="module", params=[1, 16], ids=["one pass", "random"])
def report(request):
    return made(Breaking(noise=0.01 * (request.param > 1)), passes=request.param)


@pytest.fixture(scope="module")
def broken():
    return made(Breaking())


@pytest.fixture(scope="module")
def sound():
    """The same linear model, which breaks nowhere."""
    return made(Breaking(border=0.0))


def test_what_is_driven_to_nan_at_a_radius_held_below_it(broken):
    assert {*NEAR, *FAR} <= {*broken.skipped_under_attack}
    assert {*broken.skipped} == {*FROM_THE_START, *broken.skipped_under_attack}
    for name, summary in broken.attacks.items():
        rows = {row["number"]: row for row in per_image(broken) if row["attack"] == name}
        assert not any(rows[number]["skipped_under_attack"] for number in FROM_THE_START)
        driven = [number for number, row in rows.items() if row["skipped_under_attack"]]
        assert driven and not any(rows[number]["held_at"] == LARGE for number in driven)
        assert not bool(summary.robust[driven].any())
        for number in {*driven} & {*FAR}:
            assert rows[number]["held_at"] == SMALL and bool(summary.robust_at(SMALL)[number])


def test_the_worst_case_counts_them_as_fallen_from_their_radius_on(broken):
    at = {eps: broken.if_skipped_fell_at(eps) for eps in (SMALL, LARGE)}
    assert {share.total for share in at.values()} == {38}
    driven = broken.skipped_under_attack
    held = torch.stack([summary.robust_at(SMALL) for summary in broken.attacks.values()]).all(0)
    assert at[SMALL].count == broken.worst_case_at(SMALL).count + int(held[driven].sum())
    assert int(held[driven].sum()) >= len(FAR)
    assert at[LARGE].count == broken.worst_case_at(LARGE).count


def test_rows_of_accuracies_say_what_is_left_out_and_what_it_would_make(report):
    driven, rows = len(report.skipped_under_attack), accuracies(report)
    assert driven >= len(NEAR)
    assert {(row["skipped"], row["skipped_under_attack"]) for row in rows} == {(2 + driven, driven)}
    for row in rows:
        if row["attack"] == "worst case":
            share = report.if_skipped_fell_at(row["eps"])
            assert row["least_if_skipped_fell"] == row["most_if_skipped_fell"]
            assert row["least_if_skipped_fell"] == pytest.approx(share.value)
            assert share.total == row["images"] + driven
    assert rows[0]["least_if_skipped_fell"] == pytest.approx(1, abs=0.1)  # clean, they are right
    assert rows[0]["images"] == report.clean_accuracy.total


def test_rows_without_skipped_images_say_the_same_twice(sound):
    for row in accuracies(sound):
        assert (row["skipped"], row["skipped_under_attack"]) == (0, 0)
        assert row["least_if_skipped_fell"] == row["least"]
        assert row["most_if_skipped_fell"] == row["most"]
    assert "left out" not in latex_table(sound) and "p{" not in latex_table(sound)


def test_a_budget_leaves_a_range_of_what_they_would_make():
    model = Breaking()
    stopped = made(model, max_forwards=250, batch_size=8)
    assert not stopped.complete and stopped.skipped_under_attack
    row = accuracies(stopped)[-1]
    share = stopped.if_skipped_fell_at(LARGE)
    assert row["least_if_skipped_fell"] == share.least.value < share.most.value
    assert row["most_if_skipped_fell"] == share.most.value
    assert f"{100 * share.least.value:.1f} to {100 * share.most.value:.1f}" in latex_table(stopped)


def test_the_files_for_a_paper_have_both_numbers(broken):
    fallen = broken.if_skipped_fell_at(LARGE).value
    last = list(csv.DictReader(io.StringIO(csv_table(broken))))[-1]
    assert float(last["least_if_skipped_fell"]) == fallen < float(last["accuracy"])

    driven = len(broken.skipped_under_attack)
    table = latex_table({"V-MoE_1": broken})
    assert table.count("\\multicolumn{6}{p{\\linewidth}}{\\footnotesize V-MoE\\_1: ") == 2
    assert (
        f"{2 + driven} of 40 images are left out, 2 as unreadable or not finite without any "
        f"attack and {driven} as not finite under attack alone.}} \\\\"
    ) in table
    assert (
        f"With these {driven} counted as fallen, 100.0 \\% of 38 images are right without an "
        "attack, and "
    ) in table
    assert f", {100 * fallen:.1f} \\% at 0.1 in the worst case." in table
    assert table.endswith("\\bottomrule\n\\end{tabular}\n")


def test_a_report_says_it_in_print_and_without_a_common_radius():
    model = Breaking()
    attacks = {"fgsm": FGSM(model, SMALL), "pgd": PGD(model, LARGE, steps=3, restarts=4)}
    report = made(model, attacks, eps=None)
    fallen = f"{100 * report.if_skipped_fell_at(None).value:.1f} %"
    told = f"which makes it {fallen} at the largest eps of each attack if they count as fallen"
    assert told in report.verdict and told in str(report)
    assert f"{fallen} at the largest eps in the worst case" in latex_table(report).replace("\\", "")
    assert f"images and {len(report.skipped)} skipped, clean" in repr(report)


def test_a_single_attack_is_named_in_the_foot_of_its_table():
    model = Breaking()
    report = made(model, {"pgd": PGD(model, steps=3, restarts=4)})
    fallen = 100 * report.if_skipped_fell_at(LARGE).value
    assert f"{fallen:.1f} \\% at 0.1 under pgd." in latex_table(report)


def test_a_comparison_takes_them_both_ways(broken, sound):
    found, exchanged = compare(broken, sound), compare(sound, broken)
    driven = len(broken.skipped_under_attack)
    for eps in (SMALL, LARGE):
        line = next(o for o in found.lines if (o.attack, o.eps) == ("worst case", eps))
        opposite = next(o for o in exchanged.lines if (o.attack, o.eps) == ("worst case", eps))
        assert line.result.images == 38  # all but those that are NaN from the start
        least, most = line.ends[0]
        assert least == pytest.approx(broken.if_skipped_fell_at(eps).value) and least < most
        assert line.ends[1][0] == line.ends[1][1]
        assert opposite.ends == (line.ends[1], line.ends[0])
        assert line.undecided == line.undecided_one > 0 == line.undecided_other
    assert found.lines[0].undecided == 0  # clean, they are known
    assert found.notes == [
        "Images left out, because one run skipped them: 2.",
        f"Images that an attack of the first run drove to NaN: {driven}. From that radius on they "
        "count as undecided, so that a range reaches from where they fall to where they hold.",
    ]


def test_each_attack_counts_what_it_drove_there_itself():
    """FGSM never moves a pixel without a gradient, and PGD meets the border from random points."""
    model = Breaking()
    with torch.no_grad():
        model.linear.weight[:, 0] = 0
    report = made(model, {"fgsm": FGSM(model), "pgd": PGD(model, steps=3, restarts=4)})
    driven = report.skipped_under_attack
    assert driven and not bool(report.attacks["fgsm"].skipped_under_attack.any())
    rows = {(row["attack"], row["number"]): row for row in per_image(report)}
    assert all(rows["fgsm", number]["skipped"] for number in driven)
    assert all(rows["pgd", number]["skipped_under_attack"] for number in driven)

    found = compare(report, report)
    at = {(line.attack, line.eps): line.undecided for line in found.lines}
    assert (at["fgsm", LARGE], at["pgd", LARGE]) == (0, len(driven))
    last = {row["attack"]: row for row in accuracies(report)}
    assert last["fgsm"]["most_if_skipped_fell"] > last["pgd"]["most_if_skipped_fell"]


def test_cells_stand_under_their_name_whatever_the_order_of_a_row():
    assert rows_as_text([{"a": 1, "b": 2}, {"b": 4, "a": 3}], ".csv") == "a,b\n1,2\n3,4\n"
