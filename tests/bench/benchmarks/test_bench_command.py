"""``ironmoe bench …`` on the command line."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from ironmoe.bench.benchmarks.shapes import MAIN, SHAPES


@pytest.fixture
def run():
    cli = pytest.importorskip("ironmoe.bench.cli.app")
    runner = pytest.importorskip("typer.testing").CliRunner()
    return lambda *arguments: runner.invoke(
        cli.app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"}
    )


def test_roofline(run):
    everything, one = run("roofline"), run("roofline", "--shapes", "olmoe")
    assert everything.exit_code == 0 and all(shape.name in everything.output for shape in SHAPES)
    assert one.exit_code == 0 and "hidden gradient" in one.output and MAIN.name not in one.output


def test_gpu(run, tmp_path):
    result = run("gpu", "--device", "cpu", "--only", "bits", "--out", tmp_path)
    assert result.exit_code == 0 and len(list(tmp_path.glob("*.json"))) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("roofline", "--shapes", "x"),
        ("gpu", "--device", "cpu", "--dtype", "x"),
        ("kernels", "--only", "x"),
        ("kernels", "--shapes", "1,2,3,4"),
        ("kernels", "--format", "xml"),
        ("cpu", "--format", "xml"),
        ("cpu", "--shapes", "vmoe-b16-e8"),
        ("cpu", "--shapes", "1000000,100000,100000,1000,1"),
        ("attacks", "--format", "xml"),
    ],
)
def test_bad_options_are_one_line(run, arguments):
    result = run(*arguments)
    assert (
        result.exit_code == 2
        and result.output.startswith("ironmoe: ")
        and result.output.count("\n") == 1
    )


SMALL = ("kernels", "--only", "topk_route,expert_mlp", "--shapes", "6,4,4,3,2", "--seconds", 0)


def test_kernels_are_timed_and_written_row_by_row(run, tmp_path):
    out = tmp_path / "rows.json"
    result = run(*SMALL, "--out", out, "--format", "json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert rows == json.loads(out.read_text())["rows"]
    assert {row["operation"] for row in rows} == {"topk_route", "expert_mlp"}
    assert all(row["shape"] == [6, 4, 4, 3, 2] and row["runs"] >= 3 for row in rows)
    assert all(row["fastest"] <= row["p25"] <= row["ms"] <= row["p75"] for row in rows)
    assert f"{len(rows)} to measure, in about" in result.stderr
    assert f"All {len(rows)} rows are in" in run(*SMALL, "--out", out).output


TOPK = ("kernels", "--only", "topk_route", "--shapes", "6,4,4,3,2", "--seconds", 0)
KILLED = """
import os, signal, sys
from pathlib import Path
from ironmoe.bench.common.rows import rows_file
from rich.console import Console

kept = rows_file.RowsFile.put
def put(self, *arguments):
    kept(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)

rows_file.RowsFile.put = put
from ironmoe.bench.benchmarks.kernels.run import run_bench_kernels
run_bench_kernels(Console(), operations="topk_route", shapes=["6,4,4,3,2"], seconds=0.0)
"""


def test_after_a_kill_the_same_command_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    same = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED], env=same, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (file,) = tmp_path.glob("runs/bench-kernels-*/rows.json")
    (first,) = json.loads(file.read_text())["rows"]

    again = run(*TOPK)
    assert again.exit_code == 0 and "1 of 2 rows are there" in again.output, again.output
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 and rows[0] == first


@pytest.mark.parametrize(
    "arguments",
    [
        ("cpu", "--shapes", "4,4,4,2,1", "--runs", 1),
        ("kernels",),
        ("attacks", "--data", "digits"),
    ],
)
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("absent/rows.json", "in a folder that exists"),
        (".", "got the folder"),
        ("mine.txt", "something else"),
    ],
)
def test_out_is_refused_before_anything_is_measured(run, tmp_path, arguments, out, message):
    (tmp_path / "mine.txt").write_text("mine")
    result = run(*arguments, "--out", tmp_path / out)
    assert result.exit_code == 2 and message in result.output, result.output
    assert result.output.startswith("ironmoe: ") and result.output.count("\n") == 1
    assert (tmp_path / "mine.txt").read_text() == "mine"
