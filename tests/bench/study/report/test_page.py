"""Each number on the page is that of the data, and what was not measured is said."""

import math
import re
from collections import Counter
from statistics import mean, stdev

import pytest

from ironmoe.bench.study.claims.parts.units import CORRELATION, POINTS, RATIO
from ironmoe.bench.study.claims.table import verdicts
from ironmoe.bench.study.ladder.arms import LADDER, Arm
from ironmoe.bench.study.report.arms import OUTCOMES
from ironmoe.bench.study.report.figures.over_experts import OVER_EXPERTS
from ironmoe.bench.study.report.figures.smoothness import SMOOTHNESS
from ironmoe.bench.study.report.limits import sd_factors
from ironmoe.bench.study.report.page import write_study_report
from ironmoe.bench.study.report.smallest import claims_tested, deviations, smallest
from ironmoe.bench.study.statistics.power import power

DIGITS = {unit.name: unit.digits for unit in (POINTS, RATIO, CORRELATION)}
DASH = "–"


@pytest.fixture
def write(tmp_path, read_page):
    """Write a page of made-up runs and read it; no pictures unless they are asked for."""

    def page(made_up, figures=()):
        found = verdicts(made_up.rows, made_up.arms)
        write_study_report(
            tmp_path, made_up.facts, made_up.rows, found, made_up.arms, figures=figures
        )
        return read_page(tmp_path / "report.html"), found

    return page


def number(text):
    return float(text.replace("−", "-").split()[0])


def as_printed(value, unit):
    return pytest.approx(value, abs=0.5 * 10 ** -DIGITS[unit] + 1e-12)


def test_the_table_of_claims_says_what_the_verdicts_say(made_up, write):
    study = made_up(("dense", "E2", "E8", "E8-renorm"), trainings=("standard", "pgd-at"))
    page, found = write(study)
    rows = page.table("The claims")
    assert len(rows) == len(found) == 10
    order = list(dict.fromkeys(verdict.claim for verdict in found))
    expected = sorted(found, key=lambda verdict: order.index(verdict.claim))
    for row, verdict in zip(rows, expected, strict=True):
        training, answer, effects, runs, p = row[-5:]
        primary = [effect for effect in verdict.effects if effect.role == "primary"]
        assert (training, answer, runs) == (verdict.training, verdict.verdict, str(verdict.runs))
        assert all(effect.label in effects for effect in primary)
        means = re.findall(r"([+−]?[\d.]+)(?: points| %)? \[([−\d.]+), ([−\d.]+)\]", effects)
        assert len(means) == len(primary)
        for texts, effect in zip(means, primary, strict=True):
            for text, value in zip(texts, (effect.mean, effect.low, effect.high), strict=True):
                assert number(text) == as_printed(value, effect.unit)
        assert float(p.removeprefix("< ")) == pytest.approx(primary[0].p_holm, abs=0.0051)
    sentences = [row[0] for row in rows if len(row) == 6]
    assert sentences == list(dict.fromkeys(verdict.sentence for verdict in found))


def test_every_contrast_is_on_the_page_with_its_role_and_numbers(made_up, write):
    page, found = write(made_up(("dense", "E2", "E8", "E8-renorm")))
    for verdict in found:
        assert verdict.words in page.text
        title = f"{verdict.sentence} ({verdict.training}: {verdict.verdict})"
        rows = page.table(title)
        assert len(rows) == len(verdict.effects) > 0
        by_label = {(effect.label, effect.role): effect for effect in verdict.effects}
        for label, role, effect_text, interval, runs, p, *_ in rows:
            effect = by_label.pop((label, role))
            assert number(effect_text) == as_printed(effect.mean, effect.unit)
            assert runs == str(effect.runs)
            if interval == DASH:
                assert math.isnan(effect.low)
            else:
                low, high = map(number, interval.strip("[]").split(", "))
                assert low == as_printed(effect.low, effect.unit)
                assert high == as_printed(effect.high, effect.unit)
            if p == DASH:
                assert math.isnan(effect.p)
            else:
                assert f"({effect.test})" in p.replace("\xa0", " ")
        assert not by_label


def test_means_and_deviations_of_all_arms_are_those_of_the_runs(made_up, write):
    study = made_up(("dense", "E2", "E8"), seeds=4)
    page, _ = write(study)
    headers, *rows = page.table("standard", with_headers=True)
    assert [row[0] for row in rows] == [arm.name for arm in study.arms]
    at_radius = [
        outcome._replace(
            key=outcome.key.replace("{}", "8"),
            header=outcome.header.replace("{}", "8/255")
            + f"; {min(1000, getattr(study.facts.budgets['standard'], outcome.images))}",
        )
        for outcome in OUTCOMES
    ]
    by_header = {outcome.header: outcome for outcome in at_radius}
    assert len(headers) == 2 + len(OUTCOMES) - 2  # made-up runs have no terms of layers
    seen = Counter()
    for name, runs, *row in rows:
        assert runs == "4"
        for header, cell in zip(headers[2:], row, strict=True):
            outcome = by_header[header]
            of_arm = [run.values for run in study.rows if run.arm == name]
            values = [
                outcome.scale * run[outcome.key]
                for run in of_arm
                if math.isfinite(run.get(outcome.key, math.nan))
            ]
            if not values or (outcome.key == "jump" and name == "E2"):  # it has no swap
                assert cell == DASH
                continue
            shown_mean, shown_sd = map(number, cell.split(" ± "))
            place = 0.5 * 10**-outcome.digits + 1e-12
            assert shown_mean == pytest.approx(mean(values), abs=place)
            assert shown_sd == pytest.approx(stdev(values), abs=place)
            seen[header] += 1
    assert min(seen[header] for header in headers[2:]) >= 1 and seen["clean, %; 200"] == 3


def test_arms_are_listed_with_their_cost(made_up, write):
    study = made_up(("dense", "E2", "E8-K4-wide-renorm"), seeds=2)
    page, _ = write(study)
    rows = {row[0]: row[1:] for row in page.table("All numbers")}
    assert rows["dense"][:3] == [DASH, DASH, DASH] and rows["dense"][-1] == "2"
    wide = rows["E8-K4-wide-renorm"]
    assert wide[:3] == ["8", "4", "sum to 1"] and wide[5] == "no"
    flops = study.facts.of_arm("E8-K4-wide-renorm").flops
    share = 100 * (flops / study.facts.of_arm("dense").flops - 1)
    assert number(wide[4]) == pytest.approx(share, abs=0.005)
    assert wide[6] == f"{study.facts.of_arm('E8-K4-wide-renorm').parameters:,}"
    assert "differ from the dense one by at most 0.01 %" in page.text  # E2; the wide one costs more


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (1, ["With one seed there are no intervals and no tests"]),
        (2, ["reaches 8.98 standard", "p = 0.5,", "no verdict rests on them"]),
        (3, ["reaches 2.48 standard", "0.52 to 6.28 times", "p = 0.25,", "3 seeds can show large"]),
        (8, ["reaches 0.84 standard", "0.66 to 2.04 times", "can reach p = 0.0078"]),
    ],
)
def test_the_page_says_what_so_many_seeds_can_show(made_up, write, seeds, said):
    page, _ = write(made_up(("dense", "E8"), seeds=seeds))
    assert [text for text in said if text not in page.text] == []
    assert bool(page.table("What these runs can and cannot show")) == (seeds >= 3)
    rows = page.table("standard: ", part=True)
    with_runs = [row for row in rows if row[1] == "primary"]
    assert with_runs and all((row[3] == DASH) == (seeds == 1) for row in with_runs)


def test_the_smallest_effect_is_that_of_the_power(made_up, write):
    page, found = write(made_up(("dense", "E8"), seeds=5))
    rows = page.table("What these runs can and cannot show")
    level = 0.05 / claims_tested(found, "standard")
    primary = [e for v in found for e in v.effects if e.role == "primary"]
    assert [row[0] for row in rows] == [effect.label for effect in primary]
    for row, effect in zip(rows, primary, strict=True):
        assert row[3] == smallest(effect, level)
    area = primary[0]
    found_by_hand = number(rows[0][3])
    spread = stdev(area.by_seed.values())
    assert power(found_by_hand - 0.06, spread, 5, level=level) < 0.8
    assert power(found_by_hand + 0.06, spread, 5, level=level) > 0.8
    assert power(deviations(3, 0.05), 1, 3, level=0.05) == pytest.approx(0.8, abs=1e-9)


def test_a_deviation_of_few_runs_is_uncertain():
    # χ² with 2 and 7 degrees of freedom, from tables
    assert sd_factors(3) == pytest.approx((math.sqrt(2 / 7.378), math.sqrt(2 / 0.0506)), rel=1e-3)
    assert sd_factors(8) == pytest.approx((math.sqrt(7 / 16.01), math.sqrt(7 / 1.690)), rel=1e-3)


def test_a_study_of_dense_models_says_what_it_lacks(made_up, write):
    page, found = write(made_up(("dense",), seeds=2), figures=(SMOOTHNESS, OVER_EXPERTS))
    assert {verdict.verdict for verdict in found} == {"not measured"}
    assert all(row[-4] == "not measured" and row[-1] == DASH for row in page.table("The claims"))
    assert page.text.count("no arm has experts") == 2
    assert "Gates of the source" not in page.text and "p (Holm) is corrected" not in page.text


def test_a_missing_measurement_is_named_in_claims_and_figures(made_up, write):
    study = made_up(("dense", "E8"), not_asked=("derivative",))
    for run in study.rows:
        run.values.pop("r1"), run.images.pop("r1")
    page, found = write(study, figures=(SMOOTHNESS,))
    answers = {verdict.claim: verdict.verdict for verdict in found}
    assert answers["smoothness"] == "not measured" != answers["equal cost"]
    assert "Measurements not asked for: derivative." in page.text
    assert not page.has_header("r₁, 1/255; 25") and page.has_header("‖J‖₂; 25")


def test_numbers_that_are_none_are_dashes_and_counted(made_up, write):
    study = made_up(("dense", "E8"), seeds=3)
    for run in study.rows:
        if run.arm == "dense":
            run.values["r1"] = math.nan
        elif run.seed == 1:
            run.values["least_eps"] = math.inf
    page, _ = write(study)
    headers, *rows = page.table("standard", with_headers=True)
    cells = {row[0]: dict(zip(headers, row, strict=True)) for row in rows}
    assert cells["dense"]["r₁, 1/255; 25"] == DASH
    assert cells["E8"]["least radius, 1/255; 25"].endswith(" (2)")
    assert "nan" not in page.text.lower() and "inf" not in page.text.lower().replace("linf", "")


def test_models_that_were_handed_in_are_called_so(made_up, write):
    given = ("mine@0=a.safetensors", "mine@1=b.safetensors")
    page, _ = write(made_up(("dense", "E8"), seeds=2, handed_in=given, training=None))
    assert "trained elsewhere" in page.text and "seeds are those that were given" in page.text
    assert "epochs" not in page.text and "Runs of one seed share batches" not in page.text


def test_texts_of_users_are_no_html(tmp_path, read_page, made_up):
    name = '<b>"E8" & co</b>'
    study = made_up(("dense", "E8"), notes=("<i>note</i>",), command="ironmoe --model '<u>=a'")
    rows = [run._replace(arm=name if run.arm == "E8" else run.arm) for run in study.rows]
    arms = [LADDER["dense"], Arm(name, 8, 2)]
    facts = study.facts._replace(
        arms=(study.facts.arms[0], study.facts.arms[1]._replace(arm=arms[1])),
        problems=("<s>no</s>",),
        data="<em>data",
    )
    write_study_report(tmp_path, facts, rows, verdicts(rows, arms), arms, figures=())
    page = read_page(tmp_path / "report.html")
    assert not page.tags & {"b", "i", "u", "s", "em"}
    for text in (name, "<i>note</i>", "--model '<u>=a'", "<s>no</s>", "<em>data"):
        assert text in page.text


def test_arms_whose_gates_say_little_are_named(made_up, write):
    page, _ = write(made_up(("dense", "E2", "E8-K1-renorm"), seeds=1))
    assert "Of E8-K1-renorm, with K = 1 and gates that sum to 1, every gate is 1" in page.text
    assert "Tokens of E2 take all experts" in page.text
    page, _ = write(made_up(("dense", "E8"), seeds=1))
    assert "every gate is 1" not in page.text and "take all experts" not in page.text


def test_where_nothing_is_left_to_compare_it_is_said(made_up, write):
    study = made_up(("dense", "E8"), seeds=2)
    for run in study.rows:
        run.values["pgd@16"] = 0.01
    page, _ = write(study)
    assert "Under PGD, at 16/255 (standard) every arm is below 2 % on average" in page.text
    study.rows[0].values["pgd@16"] = 0.2
    page, _ = write(study)
    assert "every arm is" not in page.text


def test_models_at_chance_and_missing_runs_are_named(made_up, write):
    study = made_up(("dense", "E8"), seeds=3)
    study.rows[0].values["clean"] = 0.1
    study.rows = [run for run in study.rows if (run.arm, run.seed) != ("E8", 2)]
    page, _ = write(study)
    assert "The clean accuracy of dense, standard, seed 0 is not above chance, 10.0 %" in page.text
    assert "Not all of 3 seeds are there of standard: E8 2." in page.text


def test_pictures_are_in_the_page_and_beside_it(tmp_path, made_up, write):
    page, _ = write(made_up(("dense", "E8"), seeds=2), figures=(SMOOTHNESS,))
    assert (tmp_path / "figures" / "smoothness-over-e.png").read_bytes().startswith(b"\x89PNG")
    (source,) = page.sources
    assert source.startswith("data:image/png;base64,iVBOR")
    assert "Means over 25 images of the first-order radius" in page.text


def test_a_study_in_which_nothing_is_measured_yet_has_a_page(tmp_path, read_page, made_up):
    study = made_up(("dense", "E8"))
    facts = study.facts._replace(arms=())
    write_study_report(tmp_path, facts, [], [], study.arms, figures=(SMOOTHNESS,))
    page = read_page(tmp_path / "report.html")
    assert "Nothing was measured yet." in page.text and "no run has “r1”" in page.text
    assert "With one seed" not in page.text
