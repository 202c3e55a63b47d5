"""The bytes of the cost model are those that layers hand to torch.distributed, in 2 and in 4
processes. All cases run in one command, because imports take longer than the layers."""

import json
from copy import deepcopy

import pytest
from typer.testing import CliRunner

from ironmoe.bench.benchmarks.passes import DX, FULL, INFERENCE
from ironmoe.bench.benchmarks.scale import check, forked, gloo, throughput
from ironmoe.bench.cli.app import app
from ironmoe.bench.common.user_error import UserError

COMMAND = ["bench", "scale", "--check"]


@pytest.fixture(scope="module")
def rows():
    return gloo.counted_rows()


def test_counted_bytes_are_equal_to_computed_ones(rows):
    cases = {(row["ranks"], row["case"], row["pass"], row["rank"]) for row in rows}
    assert len(cases) == len(rows) == (2 + 4) * len(gloo.CASES) * 3
    for row in rows:
        for name in ("rows", "counts", "sums", "exchanges"):
            assert row[name]["counted"] == row[name]["computed"], row
    assert all(row["equal"] for row in rows)


def test_the_counted_bytes_are_of_many_kinds(rows):
    """Else an equality would say little."""
    counted = {(row["ranks"], row["case"], row["pass"], row["rank"]): row["rows"] for row in rows}
    alone = {key: number["counted"] for key, number in counted.items()}
    assert len({value for (_, _, name, _), value in alone.items() if name == INFERENCE}) > 10
    for (ranks, case, name, rank), value in alone.items():
        if name == DX:
            assert (
                value == alone[ranks, case, FULL, rank] == 2 * alone[ranks, case, INFERENCE, rank]
            )
    # a rank without tokens sends what its experts give, and nothing else
    assert alone[2, "no token on rank 0", INFERENCE, 0] > 0


def test_the_command_prints_them_and_fails_where_one_differs(rows, monkeypatch):
    monkeypatch.setattr(check, "counted_rows", lambda: rows)
    result = CliRunner().invoke(app, COMMAND, env={"COLUMNS": "120"})
    assert result.exit_code == 0 and f"all {len(rows)} rows" in " ".join(result.output.split())
    assert json.loads(CliRunner().invoke(app, [*COMMAND, "--format", "json"]).stdout) == rows

    wrong = deepcopy(rows)
    wrong[3]["rows"]["counted"] += 1
    wrong[3]["equal"] = False
    monkeypatch.setattr(check, "counted_rows", lambda: wrong)
    result = CliRunner().invoke(app, COMMAND, env={"COLUMNS": "120"})
    assert result.exit_code == 1 and f"1 of {len(rows)} rows differ" in result.output


def test_a_process_that_fails_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(forked.sys, "executable", "false")
    with pytest.raises(UserError, match="--check: a process failed: code 1"):
        gloo.counted_rows()


def test_throughput_is_printed_beside_the_largest_error(monkeypatch):
    rates = {way: 1000.0 * (1 + number) for number, way in enumerate(throughput.WAYS)}
    rows = [{"pass": name, **rates, "largest error": 2e-7} for name in (INFERENCE, DX, FULL)]
    monkeypatch.setattr(throughput, "in_fresh_process", lambda *_: rows)
    command = ["bench", "scale", "--throughput"]
    output = " ".join(CliRunner().invoke(app, command, env={"COLUMNS": "120"}).output.split())
    assert f"{DX} 1000 2000 3000 1.50" in output
    assert "differ from those of one by 2e-07 at most" in output
    assert json.loads(CliRunner().invoke(app, [*command, "--format", "json"]).stdout) == rows
