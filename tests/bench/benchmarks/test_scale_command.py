"""``ironmoe bench scale`` on the command line."""

import csv
import io
import json

import pytest
from rich.console import Console

from ironmoe.bench.benchmarks.gpus import GPUS
from ironmoe.bench.benchmarks.scale.layers import LAYERS, World
from ironmoe.bench.benchmarks.scale.links import LINKS
from ironmoe.bench.benchmarks.scale.rows import PARTS, cost_rows, pays_rows
from ironmoe.bench.benchmarks.scale.tables import TABLES
from ironmoe.bench.benchmarks.scale.times import Machine
from ironmoe.bench.reports.tables import print_table


@pytest.fixture
def run():
    cli = pytest.importorskip("ironmoe.bench.cli.app")
    runner = pytest.importorskip("typer.testing").CliRunner()
    return lambda *arguments: runner.invoke(
        cli.app, ["bench", "scale", *map(str, arguments)], env={"COLUMNS": "200"}
    )


def rows_of(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


SMALL = ("--shapes", "64,16,32,8,2", "--ranks", "1,2,8", "--gpus", 8)


def test_every_table_says_that_it_is_computed_and_from_what(run):
    result = run(*SMALL)
    assert result.exit_code == 0
    assert result.output.count("(computed)") == len(PARTS)
    words = " ".join(result.output.split())
    assert "Computed, not measured, for 8 ranks a node" in words and LINKS["h100"].source in words
    assert words.count("[bold]") == 0 and "64,16,32,8,2" in words


def test_rows_stand_alone_on_standard_output(run):
    result = run(*SMALL, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert {row["ranks"] for row in rows} == {"1", "2", "4", "8"}  # 4 is of the meshes
    assert "Computed, not measured" in result.stderr


def test_options_of_the_layer_and_the_machine_reach_the_rows(run):
    fixed = (*SMALL[:2], "--ranks", 4, "--part", "cost", "--format", "json")
    (before, _, _), (after, _, _) = (
        rows_of(run(*fixed, *more))
        for more in ((), ("--tokens", 128, "--ranks-a-node", 2, "--network-gbs", 1e-3))
    )
    assert before["sizes"] == [64, 16, 32, 8, 2] and after["sizes"] == [128, 16, 32, 8, 2]
    assert before["sent_mb"] == pytest.approx(2 * 128 * 16 * 2 * 3 / 4 * 1e-6)
    assert after["sent_mb"] == pytest.approx(2 * before["sent_mb"])
    assert before["off_node_mb"] == 0
    assert after["off_node_mb"] == pytest.approx(2 / 3 * after["sent_mb"])
    # at 1 MB/s a megabyte takes a second, beside which latencies are nothing
    assert after["exchange_ms"] == pytest.approx(after["off_node_mb"] * 1000, rel=1e-2)
    uneven = rows_of(run(*fixed, "--imbalance", 2, "--shared", 64))[0]
    assert uneven["experts_ms"] > before["experts_ms"]
    assert uneven["shared_ms"] > before["shared_ms"] == 0 < uneven["hidden_ms"]


def test_chosen_layers_are_those_whose_memory_is_printed(run):
    alone = rows_of(run(*SMALL, "--part", "memory", "--format", "json"))
    assert {row["model"] for row in alone} == {"64,16,32,8,2"}
    assert [row["ranks"] for row in alone] == [1, 2, 8]
    experts = 8 * (2 * 32 * 16 + 16 * 32)
    assert all(row["experts"] == experts for row in alone)
    assert alone[2]["training_gb"] == pytest.approx((experts + alone[0]["rest"]) * 16 / 8 * 1e-9)


def test_more_layers_than_fit_are_said_not_to(run):
    few, many = (
        rows_of(run(*SMALL, "--part", "pays", "--layers", number, "--format", "json"))
        for number in (1, 10**9)
    )
    assert all(row["fastest"] for row in few)
    assert {row["fastest"] for row in many} == {None}
    assert "none fits" in run(*SMALL, "--part", "pays", "--layers", 10**9).output


@pytest.mark.parametrize(("part", "rows_of_part"), [("cost", cost_rows), ("pays", pays_rows)])
def test_tables_are_whole_on_a_screen_of_80_columns(part, rows_of_part):
    machine = Machine(GPUS["h100"], GPUS["h100"].peak, LINKS["h100"])
    rows = rows_of_part(LAYERS, [World(8), World(64)], machine)
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    print_table(TABLES[part](rows, machine), console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
