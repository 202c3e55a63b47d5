"""Reports as a phone, a screen and a screen in the dark show them."""

import json

import pytest
import torch
from demo_results import model_results
from screens import check_page, looked_at, needs_chromium, run, screenshot
from typer.testing import CliRunner

from ironmoe.attacks import Proportion
from ironmoe.bench.cli.app import app
from ironmoe.bench.demo.report import write_demo_report
from ironmoe.bench.reports import style
from ironmoe.bench.reports.page import template
from ironmoe.bench.reports.ticks import overlapping
from ironmoe.bench.train.report.facts import TrainingFacts
from ironmoe.bench.train.report.page import write_training_report

WIDTHS = (400, 1280)
CPU = torch.device("cpu")


@pytest.fixture
def figures(monkeypatch):
    """Every pair of tick texts that a picture prints over each other, as pictures are written."""
    found = []
    close = style.plt.close

    def look(figure="all"):
        if figure != "all":
            found.extend(overlapping(figure))
        close(figure)

    monkeypatch.setattr(style.plt, "close", look)
    return found


@pytest.fixture
def reports(place, figures):
    """A small report of each kind that needs no study, by name."""
    command = ["attack", "--model", "small_models:linear", "--data", "set.npz", "--norm", "L2"]
    command += ["--eps", "128", "--attack", "pgd,apgd-ce", "--steps", "5", "--attack-images", "8"]
    done = CliRunner().invoke(app, [*command, "--out", "attack"])
    assert done.exit_code == 0, done.output + repr(done.exception)

    write_demo(place / "demo", seeds=2)
    write_training(place / "train")
    return {path.parent.name: path for path in place.glob("*/report.html")}


def write_demo(folder, seeds):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shown = {
        "number": torch.arange(3),
        "clean": torch.rand(3, 1, 8, 8, generator=generator),
        "adversarial": torch.rand(3, 1, 8, 8, generator=generator),
        "label": torch.tensor([0, 1, 2]),
        "prediction": torch.tensor([1, 2, 0]),
        "fell_at_255": torch.tensor([2.0, 8.0, 24.0]),
    }
    learned = {"clean": [97, 95][:seeds], "robust": [[90, 50, 3], [88, 47, 1]][:seeds]}
    checks = ("passed", "tripped", "not looked at")
    layers = ("blocks.2.mlp", "blocks.3.mlp")
    write_demo_report(
        folder,
        [
            model_results("V-MoE", **learned, checks=checks, layers=layers),
            model_results("ViT", **learned),
        ],
        {"V-MoE": shown, "ViT": shown},
        title="V-MoE and ViT under attack: made up",
        attack="PGD-20 Linf, random start, 2 restarts",
        settings={
            "data": "made up",
            "checksum": "c0ffee" * 10,
            "attack": {"norm": "Linf", "routing_images": 50},
        },
        classes=["cat", "a class with a long name", "dog"],
        device=CPU,
    )


def write_training(folder):
    folder.mkdir()
    load = {"blocks.2.mlp": 0.3, "blocks.3.mlp": 0.5}
    curves = [
        {
            "epoch": epoch,
            "clean": 0.3 * epoch,
            "robust": 0.2 * epoch,
            "trained_on": 0.25 * epoch,
            "loss": 2.0 / epoch,
            "rate": 1e-3,
            "eps": 8 / 255,
            "load": load,
            "learned": True,
            "chance": 0.1,
        }
        for epoch in (1, 2, 3)
    ]
    share = Proportion(60, 100).as_dict()
    checks = [
        {
            "name": "softmax outputs",
            "state": "tripped",
            "tripped": True,
            "value": 1.0,
            "message": "They are.",
        }
    ]
    facts = TrainingFacts(
        name="V-MoE",
        parameters=400_000,
        classes=10,
        settings={
            "method": {"name": "pgd-at", "norm": "Linf", "eps_255": 8.0},
            "recipe": {"epochs": 3, "learning_rate": 2e-3},
            "data": "made up",
            "checksum": "c0ffee" * 10,
        },
        held_out=100,
        training={
            "chosen": 3,
            "seconds": 1.0,
            "steps": 4,
            "alpha_255": 5.0,
            "warnings": [],
            "curves": curves,
        },
        attack={"report": {"clean": share, "checks": checks}, "worst_case": [share]},
    )
    write_training_report(folder, facts, CPU, {"processes": 1, "expert_parallel": 1})


@needs_chromium
def test_reports_fit_a_phone_and_a_screen_and_have_a_dark_mode(reports, figures, tmp_path):
    assert len(reports) == 3 and figures == []  # no tick text stands on another
    for dark in (False, True):
        seen = looked_at(reports, WIDTHS, tmp_path, dark=dark)
        assert len(seen) == len(reports) * len(WIDTHS)
        for (name, _), page in seen.items():
            check_page(page, dark=dark)
            assert len(page["pictures"]) >= 3, name
            assert page["sortable"] >= 4, name

    screen = screenshot(reports["demo"], 400, tmp_path, dark=True).convert("L")
    assert screen.width == 400
    dark_pixels = sum(screen.histogram()[:60]) / (screen.width * screen.height)
    assert dark_pixels > 0.7  # of the first screen, which is text


ROWS = [["b", "≤ 40.0 % [1, 2]", "1.5 M"], ["a10", "−3.5 %", "900 k"], ["a9", "–", "10"]]


@needs_chromium
def test_a_click_on_a_header_sorts_by_value_and_says_so(tmp_path):
    parts = template("demo").environment.get_template("parts.html.jinja").module
    table = parts.table(["name", "share", "size"], ROWS)
    script = template("demo").environment.get_template("sort.js.jinja").render()
    found = run(
        f"""document.write({json.dumps(str(table))}); {script}
        const clicked = (column) => {{
          const head = document.querySelectorAll("th")[column];
          head.querySelector("button").click();
          const names = [...document.querySelectorAll("tbody tr")].map((r) => r.cells[0].innerText);
          return [head.getAttribute("aria-sort"), names.join(" ")];
        }};
        result = [clicked(1), clicked(1), clicked(2), clicked(0), clicked(0),
          document.querySelectorAll("[aria-sort]").length];
        """,
        tmp_path,
    )
    assert found == [
        ["ascending", "a10 b a9"],  # what is no number comes last, either way
        ["descending", "b a10 a9"],
        ["ascending", "a9 a10 b"],
        ["ascending", "a9 a10 b"],
        ["descending", "b a10 a9"],
        1,
    ]


def test_without_scripts_a_table_is_a_plain_table(tmp_path):
    parts = template("demo").environment.get_template("parts.html.jinja").module
    table = str(parts.table(["name", "share", "size"], ROWS))
    assert "<button" not in table and table.count("<tr>") == 4


def test_on_a_phone_each_cell_of_a_table_has_its_name():
    parts = template("demo").environment.get_template("parts.html.jinja").module
    table = str(parts.table(["name", "share", "size"], ROWS))
    assert 'class="sortable stack"' in table
    assert table.count('data-label="share"') == table.count('data-label="size"') == len(ROWS)
