"""What the demo concludes, from numbers made by hand."""

import re

import pytest
from demo_results import model_results

from ironmoe.bench.demo.check_rows import check_rows
from ironmoe.bench.demo.comparison import compare, state
from ironmoe.bench.demo.table import columns, routing_rows, rows
from ironmoe.bench.demo.verdict import verdict

MOE, VIT = "V-MoE", "ViT"


def pair(moe=None, vit=None, **options):
    """Two models of one seed, which learned and fell, unless something else is said."""
    learned = {"clean": [97], "robust": [[90, 50, 3]]}
    return [
        model_results(name, **(learned | options | (own or {})))
        for name, own in ((MOE, moe), (VIT, vit))
    ]


def row(models, label):
    (found,) = (row for row in rows(models) if row.label == label)
    return found


@pytest.mark.parametrize(
    ("right", "chance", "warned"),
    [
        (10, 0.1, True),  # at chance
        (3, 0.1, True),  # below it
        (15, 0.1, True),  # [9.3, 23.3] reaches down to 10
        (17, 0.1, False),  # [10.9, 25.5]
        (92, 0.9, True),  # nine tenths of the images are of one class
        (97, 0.9, False),
    ],
)
def test_a_model_that_cannot_be_told_from_chance_gives_no_verdict(right, chance, warned):
    lost = {"clean": [right], "robust": [[1, 1, 1]], "chance": chance}
    models = pair(vit=lost)
    lead, *others = verdict(models)
    assert lead.startswith("Verdict: none, because the ViT cannot be told from chance") == warned
    assert any("10 classes" in line for line in others) == warned
    if warned:
        assert row(models, "verdict") == ("verdict", ["fell", "at chance"], "none")


def test_the_seeds_at_chance_are_named():
    models = pair(clean=[97, 11], robust=[[90, 50, 3], [9, 5, 1]])
    assert any("V-MoE in seed 1" in line for line in verdict(models))


def test_one_seed_leaves_open_which_architecture_is_more_robust():
    models = pair(vit={"robust": [[20, 5, 0]]})
    assert "one seed leaves open" in verdict(models)[0]
    assert row(models, "verdict").difference == "open: one seed"
    assert row(models, "robust, 2/255").difference == "+70.0 apart"
    assert row(models, "robust, 24/255").difference == "+3.0 overlap"
    assert row(models, "clean").difference == "0.0 overlap"


def test_several_seeds_have_paired_intervals():
    """Differences of 2, 3 and 4 points: 3 ± 4.303 / √3."""
    clean = [97, 97, 97]
    models = pair(
        {"clean": clean, "robust": [[52], [63], [74]]},
        {"clean": clean, "robust": [[50], [60], [70]]},
    )
    (at,) = compare(*models)
    assert at.text == "+3.0 [0.5, 5.5]" and at.decided
    assert "the V-MoE is more robust at eps 2 (in 1/255)" in verdict(models)[0]
    assert row(models, "verdict").difference == "different"

    models.reverse()
    assert compare(*models)[0].text == "−3.0 [−5.5, −0.5]"
    same = pair(clean=clean, robust=[[52], [63], [74]])
    assert "3 seeds show no difference" in verdict(same)[0]


def test_nothing_fell_is_said():
    models = pair(clean=[97], robust=[[97, 97, 97]])
    assert "nothing fell, up to eps 24/255" in verdict(models)[0]
    assert sum("No image of the" in line for line in verdict(models)) == 2
    assert row(models, "verdict").cells == ["nothing fell", "nothing fell"]


def test_tripped_checks_are_in_the_verdict_the_table_and_the_rows():
    models = pair(moe={"checks": ("passed", "tripped", "not looked at")})
    lead, *others = verdict(models)
    assert "tripped for the V-MoE:" in lead and any("loss still rising" in line for line in others)
    assert state(models[0]) == "checks tripped" and state(models[1]) == "fell"
    assert row(models, "checks").cells == ["1 of 2 tripped", "1 passed"]

    found = check_rows(models)
    assert [worst for worst, _ in found] == ["tripped", "passed", "not looked at"]
    assert found[0][1] == ["loss still rising at the end", "tripped", "–", "More."]
    assert found[1][1][1:3] == ["passed", "passed"]


def test_a_check_that_tripped_in_one_seed_tripped():
    models = pair(clean=[97, 97], robust=[[90, 50, 3]] * 2)
    models[0].runs[1]["checks"] = [models[0].runs[0]["checks"][0] | {"state": "tripped"}]
    assert models[0].counted_checks == {"tripped": 1, "passed": 0, "not looked at": 0}


def test_the_table_fits_a_terminal_of_80_columns():
    models = pair()
    widths = [max(map(len, column)) for column in zip(columns(models), *cells(models), strict=True)]
    assert sum(widths) + 3 * len(widths) + 1 <= 80


def cells(models):
    return [(row.label, *row.cells, row.difference) for row in rows(models)]


def test_routing_has_a_row_for_clean_images_and_for_each_eps():
    (moe, _) = pair(moe={"layers": ("blocks.2.mlp",)})
    clean, *attacked = routing_rows(moe)
    assert clean == ["clean", "–", "1.0 × even"]
    assert attacked == [[eps, "25.0 %", "1.5 × even"] for eps in ("2", "8", "24")]


def test_routing_that_one_run_could_not_measure_is_left_out():
    """All its images were wrong from the start."""
    (moe, _) = pair(
        moe={"clean": [97, 97], "robust": [[90, 50, 3]] * 2, "layers": ("mlp",)}, vit={}
    )
    moe.runs[1]["routing"][0]["layers"] = {}
    assert moe.layers == []


def test_sentences_end_and_have_no_doubled_spaces():
    for models in (pair(), pair(clean=[97, 96], robust=[[90, 50, 3]] * 2), pair(clean=[9])):
        for line in verdict(models):
            assert line.endswith(".") and not re.search(r"  |\.\.", line)
