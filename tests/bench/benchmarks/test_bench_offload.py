"""``ironmoe bench offload``: what it counts, and its rows."""

import json
from contextlib import ExitStack

import offload_tables
import pytest
import scale_tables
from typer.testing import CliRunner

from ironmoe.bench.benchmarks.offload.modes import MODES, PLAIN, Attacked, Size
from ironmoe.bench.benchmarks.offload.run import PCIE_5, _is_whole
from ironmoe.bench.benchmarks.scale.layers import BFLOAT16, DEEPSEEK, LAYERS
from ironmoe.bench.cli.app import app

SMALL = Size(width=64, blocks=2, experts=4)
EXPERTS = 4 * 4 * (2 * 64 * 256 + 64 + 256)  # bytes of one layer


@pytest.fixture(scope="module")
def memory():
    with ExitStack() as within:
        return {mode: Attacked(within, SMALL, mode, 1).memory() for mode in MODES}


def test_experts_are_copied_where_they_are_offloaded_alone(memory):
    offloaded = {mode for mode, found in memory.items() if found.copied}
    assert offloaded == {mode for mode in MODES if "offload" in mode}
    assert memory["offload, half stay"].copied < memory["offload"].copied <= 2 * EXPERTS
    # checkpointing brings them in for the forward pass in backward, too
    assert memory["offload"].copied < memory["offload, checkpointing"].copied <= 3 * EXPERTS
    for mode, found in memory.items():
        left = memory[PLAIN].weights - (EXPERTS if mode in offloaded else 0)
        assert found.weights == left


def test_each_mode_saves_what_it_is_for(memory):
    saved = {mode: found.saved for mode, found in memory.items()}
    assert saved["checkpointing"] < saved["recompute"] < saved[PLAIN]
    # neither weights nor copies of them wait for the backward pass
    assert abs(saved["offload"] - saved[PLAIN]) < EXPERTS / 20
    assert abs(saved["offload, checkpointing"] - saved["checkpointing"]) < EXPERTS / 20


def test_rows_are_written_and_an_impossible_one_is_known(tmp_path):
    out = tmp_path / "rows.json"
    numbers = ("--images", "1", "--width", "64", "--blocks", "2", "--experts", "4")
    command = ["bench", "offload", *numbers, "--runs", "3", "--seconds", "0", "--out", str(out)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert all(mode in result.output for mode in MODES)
    (row,) = json.loads(out.read_text())["rows"]
    assert _is_whole(row)
    assert not _is_whole(row | {"fastest": {}})
    assert not _is_whole(row | {"runs": 0})


def test_images_that_are_no_numbers_are_one_line():
    result = CliRunner().invoke(app, ["bench", "offload", "--images", "0"])
    assert result.exit_code == 2
    assert "--images must be whole numbers above 0" in " ".join(result.output.split())


def test_the_tables_of_the_page_are_those_of_the_rows_and_of_today():
    page = scale_tables.PAGE.read_text()
    found = scale_tables.with_tables(page, offload_tables.TABLES)
    assert found == page, "python tests/support/offload_tables.py"
    assert all(f"<!-- {name}: begin -->" in page for name in offload_tables.TABLES)


def test_the_recipe_says_what_the_tables_say():
    """docs/scale.md, One GPU."""
    words = " ".join(scale_tables.PAGE.read_text().split())
    of_rows = {
        row["images"]: {mode: row["cpu_ms"][mode] / row["cpu_ms"][PLAIN] for mode in MODES}
        for row in json.loads(offload_tables.ROWS.read_text())["rows"]
    }
    one, eight = of_rows[1], of_rows[8]
    assert (
        f"takes {one['offload']:.1f} times as long with one image, and {eight['offload']:.1f} "
        f"times with 8; with `--recompute` alone {one['recompute']:.2f} and "
        f"{eight['recompute']:.2f} times"
    ) in words
    seconds = [2 * BFLOAT16 * of.repeats * of.expert_numbers / PCIE_5 for of in LAYERS[:2]]
    layer = BFLOAT16 * DEEPSEEK.expert_numbers
    assert (
        f"at least {seconds[0]:.1f} s a step for L/16 and {seconds[1]:.2f} s for H/14, and "
        f"{2 * layer / PCIE_5:.2f} s for each layer of DeepSeek-V3, whose experts have "
        f"{layer / 1e9:.1f} GB"
    ) in words
