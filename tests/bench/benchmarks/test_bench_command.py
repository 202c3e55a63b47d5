"""``ironmoe bench …`` on the command line."""

import json
from importlib.util import find_spec

import pytest

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
    ],
)
def test_bad_options_are_one_line(run, arguments):
    result = run(*arguments)
    assert (
        result.exit_code == 2
        and result.output.startswith("ironmoe: ")
        and result.output.count("\n") == 1
    )


@pytest.mark.skipif(find_spec("pytest_benchmark") is None, reason="needs pytest-benchmark")
def test_kernels(tmp_path, monkeypatch):
    # pytest-benchmark measures nothing under xdist
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    from ironmoe.bench.benchmarks.run_kernel_benchmarks import run_bench_kernels

    assert run_bench_kernels("topk_route,plan_dispatch", 0.001, tmp_path / "out.json") == 0
    measured = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert {b["group"] for b in measured} == {"topk_route", "plan_dispatch"}
