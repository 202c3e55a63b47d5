"""Reports as rows, CSV, JSON lines and LaTeX: what is written is what the report says, and what is
read back is what was written."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ironmoe.attacks import (
    FGSM,
    PGD,
    AttackResult,
    AutoAttack,
    Regression,
    Square,
    accuracies,
    csv_table,
    evaluate,
    latex_table,
    per_image,
    read_rows,
    write_rows,
)
from ironmoe.attacks.engine.counters import SIGNS
from ironmoe.attacks.evaluation.checksum import checksum
from ironmoe.attacks.results.image_rows import IMAGE_COLUMNS

PAGE = (Path(__file__).parents[3] / "docs" / "results.md").read_text()
EPS = [1 / 255, 4 / 255, 0.05]


def model_and_data(seed=0, count=40):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images = torch.rand(count, 1, 8, 8)
    labels = model(images).argmax(1)
    labels[::9] = (labels[::9] + 1) % 10
    return model, images, labels


def made(model, images, labels, **options):
    attacks = {
        "pgd_5": PGD(model, steps=5),
        "AA & co": AutoAttack(model, version="custom", attacks_to_run=["apgd-ce", "square"]),
    }
    attacks["AA & co"].stages[0].steps = 10
    attacks["AA & co"].stages[1] = Square(model, steps=30)
    return evaluate(model, (images, labels), attacks, eps=EPS, checks=False, **options)


@pytest.fixture(scope="module")
def report():
    return made(*model_and_data())


class Flipping(nn.Module):
    """A linear model that negates its logits in a tenth of its answers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, images):
        signs = 1 - 2 * (torch.rand(len(images), 1) < 0.1).float()
        return signs * self.linear(images.flatten(1))


@pytest.fixture(scope="module")
def random_report():
    torch.manual_seed(1)
    model, images = Flipping(), torch.rand(30, 1, 8, 8)
    labels = model.linear(images.flatten(1)).argmax(1)
    attacks = {"pgd": PGD(model, steps=3), "fgsm": FGSM(model)}
    return evaluate(model, (images, labels), attacks, eps=EPS)


@pytest.fixture(scope="module")
def interrupted():
    """Ended by its budget before all was decided."""
    report = made(*model_and_data(), max_forwards=500)
    assert not report.complete
    return report


def test_rows_say_of_each_image_what_the_report_says(report):
    model, images, labels = model_and_data()
    predictions = model(images).argmax(1)
    rows = per_image(report)
    assert len(rows) == 2 * len(images)
    assert [row["attack"] for row in rows] == ["pgd_5"] * 40 + ["AA & co"] * 40
    for name, summary in report.attacks.items():
        mine = [row for row in rows if row["attack"] == name]
        assert [row["number"] for row in mine] == list(range(40))
        assert [row["label"] for row in mine] == labels.tolist()
        assert [row["clean_prediction"] for row in mine] == predictions.tolist()
        assert [row["clean_right"] for row in mine] == (predictions == labels).tolist()
        assert [row["distance"] for row in mine] == summary.distance.tolist()
        assert sum(row["forwards"] for row in mine) == summary.forwards
        assert sum(row["backwards"] for row in mine) == summary.backwards
        assert [row["checksum"] for row in mine] == [
            checksum(image, checksum(label)) for image, label in zip(images, labels, strict=True)
        ]
        fell = [row for row in mine if row["fell"]]
        assert 0 < len(fell) < 40 and {row["part"] for row in fell} <= {
            s for _, s in summary.stages
        }
        assert all(row["distance"] <= row["eps"] and row["steps"] >= 0 for row in fell)
        held = [row for row in mine if not row["fell"]]
        assert all(row["eps"] is row["part"] is row["steps"] is None for row in held)


def test_an_image_falls_above_the_radius_where_it_held(report, interrupted):
    for row in per_image(report):
        if not row["clean_right"]:
            assert row["held_at"] is None and not row["fell"]
        else:
            known = [row["held_at"], row["eps"]]
            assert known in ([None, EPS[0]], [EPS[0], EPS[1]], [EPS[1], EPS[2]], [EPS[2], None])
    open_ = [row for row in per_image(interrupted) if not row["decided"] and not row["fell"]]
    assert open_ and all(row["held_at"] in (None, EPS[0], EPS[1]) for row in open_)


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_rows_that_are_read_back_are_the_rows_that_were_written(
    ending, report, random_report, tmp_path
):
    path = tmp_path / f"rows{ending}"
    write_rows(random_report, path)
    assert read_rows(path) == per_image(random_report)
    write_rows(report, path)
    assert read_rows(path) == per_image(report)
    both = {"plain, with a comma": report, 'with "quotes"\nand lines': report}
    write_rows(both, str(path))
    assert read_rows(path) == per_image(both)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_other_programs_read_the_files(report, tmp_path):
    write_rows(report, tmp_path / "rows.csv")
    write_rows(report, tmp_path / "rows.jsonl")
    with (tmp_path / "rows.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert lines == per_image(report)
    assert [float(row["distance"]) for row in table] == [row["distance"] for row in lines]
    assert {row["fell"] for row in table} == {"true", "false"}
    assert "" in {row["eps"] for row in table} and None in {row["eps"] for row in lines}


def test_a_column_is_one_entry_and_flags_are_those_of_results(report):
    names = [column.name for column in IMAGE_COLUMNS]
    assert list(per_image(report)[0]) == ["attack", *names]
    assert set(SIGNS) <= set(names) and "flags" in AttackResult.__dataclass_fields__
    for column in IMAGE_COLUMNS:
        values = [row[column.name] for row in per_image(report)]
        assert {type(value) for value in values if value is not None} <= {column.kind}
        assert f"``{column.name}``" in per_image.__doc__ or column.name in SIGNS
        assert f"`{column.name}`" in PAGE


def test_rows_of_a_goal_without_classes_have_its_figure(tmp_path):
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), torch.rand(20, 1, 8, 8)
    values = model(images).detach()
    attacks = {"pgd": PGD(model, steps=5, goal=Regression(0.05))}
    report = evaluate(model, (images, values), attacks, eps=[0.002, 0.05], checks=False)

    rows = per_image(report)
    assert {row[name] for row in rows for name in ("label", "clean_prediction")} == {None}
    assert [row["figure"] for row in rows] == report.attacks["pgd"].figure.tolist()
    assert all((row["figure"] > 0.05) == row["fell"] for row in rows)
    write_rows(report, tmp_path / "rows.csv")
    assert read_rows(tmp_path / "rows.csv") == rows


def test_a_summary_made_by_hand_leaves_out_what_it_does_not_say(report):
    by_hand = {name: replace(s, per_image={}) for name, s in report.attacks.items()}
    rows = per_image(replace(report, attacks=by_hand))
    assert {row["label"] for row in rows} == {row["checksum"] for row in rows} == {None}
    assert [row["fell"] for row in rows] == [row["fell"] for row in per_image(report)]


def test_a_file_of_another_kind_is_refused(report, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.csv or \.jsonl, got '\.parquet'"):
        write_rows(report, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"must end in \.csv or \.jsonl"):
        read_rows(tmp_path / "rows.txt")
    (tmp_path / "rows.csv").write_text("fell\nperhaps\n")
    with pytest.raises(ValueError, match="must be true or false, got 'perhaps'"):
        read_rows(tmp_path / "rows.csv")


def test_accuracies_are_those_of_the_report(report, interrupted):
    for each in (report, interrupted):
        rows = accuracies(each)
        at = {(row["attack"], row["eps"]): row for row in rows}
        clean = at["clean", None]
        assert (clean["right"], clean["images"]) == (each.clean_accuracy.count, 40)
        for name, summary in each.attacks.items():
            for eps, share in summary.curve.items():
                row = at[name, eps]
                undecided = int(summary.undecided_at(eps).sum())
                assert row["undecided"] == share.undecided == undecided
                assert row["accuracy"] == (None if undecided else share.value)
                assert (row["right"], row["least"]) == (share.least.count, share.least.value)
                assert row["most"] == share.most.value
                assert (row["low"], row["high"]) == share.interval()
        worst = at["worst case", EPS[-1]]
        assert (worst["right"], worst["most"]) == (
            each.worst_case.least.count, each.worst_case.most.value
        )  # fmt: skip
        assert len(rows) == 1 + 3 * len(EPS)
    assert {row["model"] for row in rows} == {None}


def test_accuracies_of_a_random_model_are_expected_ones_of_a_pass(random_report):
    at = {(row["attack"], row["eps"]): row for row in accuracies(random_report)}
    pairs = [(at["clean", None], random_report.clean_accuracy)]
    pairs.append((at["worst case", EPS[-1]], random_report.worst_case))
    for name, summary in random_report.attacks.items():
        pairs += [(at[name, eps], share) for eps, share in summary.curve.items()]
    for row, share in pairs:
        assert row["passes"] == random_report.passes > 1
        assert (row["accuracy"], row["right"]) == pytest.approx((share.value, share.count))
        assert (row["low"], row["high"]) == pytest.approx(share.interval())
    assert abs(at["clean", None]["accuracy"] - 0.9) < 0.05

    for row in per_image(random_report):
        halves = row["right_first"], row["right_second"]
        assert [len(half) for half in halves] == [1 + len(EPS)] * 2
        assert all(0 <= count <= row["passes"] // 2 for half in halves for count in half)


def test_skipped_images_count_nowhere(report):
    skipped = torch.zeros(40, dtype=torch.bool)
    skipped[:7] = True
    attacks = {name: replace(s, skipped=skipped) for name, s in report.attacks.items()}
    rest = replace(report, attacks=attacks)
    for row in accuracies(rest):
        assert row["images"] == 33
    assert accuracies(rest)[0]["right"] == rest.clean_accuracy.count
    assert accuracies(rest)[-1]["right"] == rest.worst_case.count
    assert sum(row["skipped"] for row in per_image(rest)) == 2 * 7


def test_attacks_without_a_common_radius_have_a_worst_case_at_their_largest_ones():
    model, images, labels = model_and_data()
    attacks = {"small": FGSM(model, eps=0.01), "large": FGSM(model, eps=0.05)}
    report = evaluate(model, (images, labels), attacks, checks=False)
    last = accuracies(report)[-1]
    assert (last["attack"], last["eps"]) == ("worst case", None)
    assert last["right"] == report.worst_case.count
    assert "each at its largest" in latex_table(report)
    single = evaluate(model, (images, labels), {"fgsm": FGSM(model)}, checks=False)
    assert "worst case" not in {row["attack"] for row in accuracies(single)}


def test_the_csv_table_holds_the_accuracies(report):
    table = list(csv.DictReader(io.StringIO(csv_table({"a": report, "b,c": report}))))
    expected = accuracies({"a": report, "b,c": report})
    assert [row["model"] for row in table] == ["a"] * 10 + ["b,c"] * 10
    assert [float(row["accuracy"]) for row in table] == [row["accuracy"] for row in expected]


def cells_of(table):
    """The rows between the rules, cut at &, without escaped ones."""
    body = [line for line in table.splitlines() if line.endswith("\\\\")]
    parts = [line.removesuffix("\\\\").replace("\\&", "\0").split("&") for line in body]
    return [[part.strip().replace("\0", "\\&") for part in row] for row in parts]


def test_the_latex_table_has_a_row_an_attack_and_a_column_a_radius(report):
    table = latex_table({"V-MoE": report, "50 % [robust]": report})
    head, *rows = cells_of(table)
    radii = [f"$\\varepsilon = {eps}$" for eps in ("1/255", "4/255", "0.05")]
    assert head == ["Model", "Attack", "$n$", "Clean", *radii]
    assert [row[0] for row in rows] == ["V-MoE", "", "", "50 \\% {[}robust]", "", ""]
    assert [row[1] for row in rows[:3]] == ["pgd\\_5", "AA \\& co", "worst case"]
    assert {len(row) for row in [head, *rows]} == {7}
    assert [row[2] for row in rows] == ["40", "", "", "40", "", ""]
    assert rows[0][3] == str(report.clean_accuracy).replace(" %", "")
    curve = list(report.attacks["AA & co"].curve.values())
    assert rows[1][4:] == [str(share).replace(" %", "") for share in curve]
    assert table.count("\\midrule") == 2 and "\\begin{tabular}{llrrrrr}" in table
    assert table.count("\\toprule") == table.count("\\bottomrule") == 1


def test_a_latex_table_can_leave_out_models_and_intervals(report, interrupted):
    head, *rows = cells_of(latex_table(report, intervals=False, digits=2))
    assert head[0] == "Attack"
    assert rows[0][2] == f"{100 * report.clean_accuracy.value:.2f}"
    assert "[" not in latex_table(report, intervals=False)
    open_ = cells_of(latex_table(interrupted))[-1][-1]
    high = 100 * accuracies(interrupted)[-1]["high"]
    least, most = (100 * accuracies(interrupted)[-1][name] for name in ("least", "most"))
    assert open_.startswith(f"{least:.1f} to {most:.1f} [") and open_.endswith(f"{high:.1f}]")
    assert latex_table(accuracies(report)) == latex_table(report)


def test_a_latex_table_says_what_its_numbers_are(report, random_report):
    above = latex_table(report).splitlines()[0]
    assert above == (
        "% needs \\usepackage{booktabs}. Accuracies in percent of 40 images, with 95 \\% Wilson "
        "intervals"
    )
    both = latex_table({"a": report, "b": random_report}, confidence=0.9).splitlines()[0]
    assert both.endswith(
        "of 30 or 40 images, with 90 \\% Wilson intervals; of random models, the expected ones "
        "of a pass"
    )


def test_signs_that_latex_would_read_are_escaped():
    row = accuracies_by_hand(attack="a&b_c%d#e$f{g}h~i^j\\k<l>m*[n")
    table = latex_table([accuracies_by_hand(attack="clean", eps=None), row])
    assert (
        r"a\&b\_c\%d\#e\$f\{g\}h\textasciitilde{}i\textasciicircum{}j\textbackslash{}k"
        r"\textless{}l\textgreater{}m{*}{[}n" in table
    )


@pytest.mark.parametrize(
    ("eps", "text"),
    [(8 / 255, "8/255"), (0.2, "0.2"), (0.5, "0.5"), (1.0, "1"), (128 / 255, "128/255"),
     (0.1 + 0.2, "0.30000000000000004"), (0.0, "0"), (0.001 / 255, "0.001/255"),
     (1e-6, "0.000001"), (4.0000001 / 255, "0.015686274901960784")],
)  # fmt: skip
def test_a_radius_is_written_in_the_shortest_exact_way(eps, text):
    assert f"$\\varepsilon = {text}$" in latex_table([accuracies_by_hand(eps=eps)])


def accuracies_by_hand(attack="pgd", eps=0.1):
    numbers = {"accuracy": 0.5, "least": 0.5, "most": 0.5, "low": 0.2, "high": 0.8}
    numbers["confidence"] = 0.95
    counts = {"right": 5, "images": 10, "undecided": 0, "passes": 1}
    return {"model": None, "attack": attack, "eps": eps, **numbers, **counts}


def test_no_row_and_no_confidence_are_refused(report):
    with pytest.raises(ValueError, match="at least one accuracy, got none"):
        latex_table([])
    for make in (csv_table, latex_table):
        with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 95"):
            make(report, confidence=95)
