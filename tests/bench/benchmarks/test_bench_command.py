"""``ironmoe bench …`` on the command line."""

import json
import os
import signal
import subprocess
import sys
from io import StringIO
from itertools import product

import pytest
import torch
from rich.console import Console

from ironmoe.bench.benchmarks.cpu.run import _is_whole as cpu_is_whole
from ironmoe.bench.benchmarks.cpu.run import _legend as cpu_legend
from ironmoe.bench.benchmarks.cpu.run import _table as cpu_table
from ironmoe.bench.benchmarks.gpu.child import AssignedJob
from ironmoe.bench.benchmarks.gpu.options import make_options
from ironmoe.bench.benchmarks.passes import DX, FORWARD
from ironmoe.bench.benchmarks.shapes import MAIN, SHAPES, Shape
from ironmoe.bench.reports.tables import print_table


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
    assert "(T,d,n,E,K)" in one.output and "olmoe 32768,2048,1024,64,8" in one.output
    passes = [line for line in everything.output.splitlines() if " forward + dX " in line]
    assert len(passes) == len(SHAPES) and all(line.split()[-1] == "FLOPs" for line in passes[:1])
    assert all(line.split()[-1] in ("FLOPs", "bytes") for line in passes)


def cpu_rows(name):
    ms = {"ironmoe": 12345.6, "eager": 23456.7, "grouped_mm": 34567.8, "dense": 987.6}
    return [
        {"name": name, "dtype": dtype, "pass": asked, "milliseconds": ms, "runs": 3}
        for dtype, asked in product(("float32", "bfloat16"), (FORWARD, DX))
    ]


def test_layers_of_the_cpu_table_are_told_apart_on_a_screen_of_80_columns():
    layers = ("decode-32", "decode-128", "788,192,768,8,2", "32768,14336,14336,512,10")
    console = Console(width=80, file=StringIO(), force_terminal=True, color_system=None)
    print_table(cpu_table([row for name in layers for row in cpu_rows(name)]), console)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert all(lines.count(layer) == 1 for layer in layers) and max(map(len, lines)) <= 80
    assert sum(line.startswith("bfloat16 forward + dX") for line in lines) == 4
    heading = " ".join(lines[: lines.index("decode-32")])
    assert "…" not in console.file.getvalue() and "grouped_mm" in heading


def test_the_legend_of_bench_cpu_gives_the_sizes_of_names_alone():
    named, own = Shape("mixtral", 9, 8, 7, 6, 5), Shape("9,8,7,6,5", 9, 8, 7, 6, 5)
    assert "As T,d,n,E,K mixtral is 9,8,7,6,5. " in cpu_legend([named, own])
    assert "9,8,7,6,5" not in cpu_legend([own])


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
        ("scale", "--part", "x"),
        ("scale", "--shapes", "x"),
        ("scale", "--gpu", "rtx4090"),
        ("scale", "--ranks", "0"),
        ("scale", "--ranks", "two"),
        ("scale", "--ranks", "5,7"),
        ("scale", "--format", "xml"),
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


@pytest.mark.parametrize(
    "change",
    [{"ms": 1e9}, {"fastest": 1e9}, {"p25": "abc"}, {"runs": -3}, {"runs": 2.5}, {"p75": 1e-9}],
)
def test_an_impossible_row_of_an_operation_is_timed_again(run, tmp_path, change):
    out = tmp_path / "rows.json"
    run(*TOPK, "--out", out)
    content = json.loads(out.read_text())
    content["rows"][0] |= change
    out.write_text(json.dumps(content))
    again = run(*TOPK, "--out", out)
    assert again.exit_code == 0 and "1 of 2 rows are there. 1 row was damaged" in again.output
    assert "All 2 rows" in run(*TOPK, "--out", out).output


def test_a_row_of_bench_cpu_has_every_layer_and_no_median_below_the_fastest_run():
    whole = {"milliseconds": dict.fromkeys(cpu_rows("x")[0]["milliseconds"], 2.0), "runs": 3}
    whole["fastest"] = dict.fromkeys(whole["milliseconds"], 1.0)
    assert cpu_is_whole(whole)
    for name, value in (("milliseconds", 0.5), ("fastest", 3.0), ("fastest", None)):
        assert not cpu_is_whole(whole | {name: whole[name] | {"eager": value}})
    assert not cpu_is_whole(whole | {"runs": 0})
    few = {who: 2.0 for who in whole["milliseconds"] if who != "dense"}
    assert not cpu_is_whole(whole | {"milliseconds": few})


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


def test_gpu_names_its_machine_and_says_how_an_interrupted_run_goes_on(run, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ironmoe.bench.benchmarks.gpu.run.GpuRun._do", interrupt)
    result = run("gpu", "--device", "cpu", "--only", "bits", "--out", tmp_path)
    assert result.exit_code == 130 and "the same command with --resume goes on" in result.output
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["made"]["machine"]["processor"]

    (tmp_path / "file").touch()
    refused = run("gpu", "--device", "cpu", "--only", "bits", "--out", tmp_path / "file")
    assert refused.exit_code == 2 and "--out must be a folder that can be written" in refused.output


def test_the_process_of_a_gpu_job_knows_a_layer_of_five_numbers(tmp_path):
    layer = "12,8,8,4,2"
    (shape,) = make_options(device="cpu", shapes=[layer]).shapes
    request = {"kind": "case", "shape": shape.name, "routing": "uniform", "dtype": "float32"}
    request |= {"device": "cpu", "seconds": 1.0, "rounds": 3, "without": []}
    assigned = AssignedJob.from_request(request | {"run_log": str(tmp_path / "log.jsonl")})
    assert assigned.job.shape == shape and shape.sizes == (12, 8, 8, 4, 2)
