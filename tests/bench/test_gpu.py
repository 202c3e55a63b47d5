"""The GPU benchmark rehearsed on CPU: who may be timed, what the files hold, and its command lines."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from ironmoe.bench import gpu, gpu_measure, peers, timing, tune
from ironmoe.bench.gpu_report import goals
from ironmoe.bench.passes import DX, FORWARD, FULL, INFERENCE, UNFROZEN
from ironmoe.bench.peers import DENSE, OURS, Peer, errors, ironmoe, reference
from ironmoe.bench.roofline import MOVES_ROWS
from ironmoe.bench.shapes import MAIN, REHEARSAL, ROUTINGS, SHAPES, make_problem
from ironmoe.bench.tune import neighbours, patched, table_of
from ironmoe.kernels import tuning

CPU = torch.device("cpu")
GATED, BIASES = REHEARSAL
TIMED_ON_CPU = (INFERENCE, FORWARD, DX, FULL, UNFROZEN)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Two rounds of everything, on one thread: on a busy machine two wait for each other."""
    for module in (gpu_measure, tune):
        monkeypatch.setattr(module, "interleaved", lambda runs, device: timing.interleaved(runs, device, rounds=2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rehearse(tmp_path, *arguments):
    """(exit status, contents of the JSON file, of the Markdown file)."""
    status = gpu.main(["--device", "cpu", "--minutes", "2", "--out", str(tmp_path), *arguments])
    (numbers,), (text,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
    return status, json.loads(numbers.read_text()), text.read_text()


def test_a_rehearsal_writes_what_it_measured(tmp_path, capsys):
    status, results, text = rehearse(tmp_path, "--skip-tests")
    assert status == 0 and results["finished"] and not list(tmp_path.glob("*.partial"))
    places = {(r["shape"], r["routing"]) for r in results["rows"]}
    assert places == {(GATED.name, routing) for routing in ROUTINGS} | {(BIASES.name, "uniform")}
    for shape, routing in places:
        here = [r for r in results["rows"] if (r["shape"], r["routing"]) == (shape, routing)]
        for name in (OURS, "torch grouped_mm", DENSE):
            assert {r["pass"] for r in here if r["implementation"] == name} >= set(TIMED_ON_CPU), (name, shape, routing)
        assert {r["pass"] for r in here if "gb_per_s" in r} == {f"kernel {name}" for name in (*MOVES_ROWS, "linf_step")}
    for row in results["rows"]:
        assert 0 < row["p20"] <= row["ms"] <= row["p80"] and row["runs"] == 2
        assert row["pass"].startswith("kernel") or row["tflops"] > 0
    assert results["versions"]["torch"] == torch.__version__ and results["goals"] == []
    assert "rehearsal" in text and GATED.name in text and "Not measured" in text
    assert f"Wrote {tmp_path}" in capsys.readouterr().out


def test_time_that_is_over_is_said(tmp_path):
    status, results, text = rehearse(tmp_path, "--skip-tests", "--minutes", "0.001")
    assert status == 0 and not results["finished"] and results["rows"] == []
    assert all(f"{shape.name} {routing}" in results["why_not_finished"] for shape, routing in gpu.cases(REHEARSAL))
    assert "Not finished: no time for" in text


@pytest.mark.parametrize(
    "problem", [make_problem(s, r, torch.float32, CPU) for s, r in [(GATED, "zipf"), (BIASES, "half_empty")]]
)
def test_everyone_here_agrees_with_the_reference(problem):
    correct = reference(problem, sample=17)
    for name, peer in {OURS: peers.IRONMOE, **peers.PEERS}.items():
        if peer.why_not(problem) is None:
            found = errors(peer.build, problem, correct)
            assert {"y", "x", "gates", "w_in", "x with frozen weights", "y in inference"} <= set(found)
            assert peers.disagreement(found, torch.float32) is None, (name, found)


def scaled(problem):
    layer = ironmoe(problem)
    return lambda: 1.001 * layer()


def one_row(problem):
    layer = ironmoe(problem)
    factor = torch.ones(problem.shape.tokens, 1)
    factor[3] = 0
    return lambda: factor * layer()


def without_gates(problem):
    return ironmoe(problem._replace(gates=problem.gates.detach()))


def not_finite(problem):
    layer = ironmoe(problem)
    return lambda: layer() * float("nan")


@pytest.mark.parametrize("wrong", [scaled, one_row, without_gates, not_finite])
def test_a_wrong_peer_is_reported_and_not_timed(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(gpu_measure, "PEERS", {"wrong": Peer(wrong, "torch")})
    status, results, text = rehearse(tmp_path, "--skip-tests", "--shapes", BIASES.name, "--dtype", "float32")
    assert status == 0 and "wrong" not in {r["implementation"] for r in results["rows"]}
    (note,) = [n for n in results["notes"] if n["implementation"] == "wrong"]
    assert "disagrees with the reference in" in note["why"] and note["why"] in text


def test_we_are_not_timed_when_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_measure, "IRONMOE", Peer(scaled, "torch"))
    status, results, _ = rehearse(tmp_path, "--skip-tests", "--shapes", BIASES.name, "--dtype", "float32")
    assert status == 1 and results["rows"] == [] and "disagrees" in capsys.readouterr().out


def test_a_peer_that_fails_costs_its_own_rows_only(tmp_path, monkeypatch):
    def broken(problem):
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(gpu_measure, "PEERS", {"broken": Peer(broken, "torch"), "absent": Peer(broken, "a_package_nobody_has")})
    status, results, _ = rehearse(tmp_path, "--skip-tests", "--shapes", BIASES.name)
    why = {n["implementation"]: n["why"] for n in results["notes"]}
    assert why["broken"] == "check: ZeroDivisionError: first line" and why["absent"] == "a_package_nobody_has is not installed"
    assert status == 0 and {r["implementation"] for r in results["rows"]} == {OURS, DENSE}


def test_a_broken_device_stops_the_run_with_its_files(tmp_path, monkeypatch):
    def broken(problem):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_measure, "PEERS", {"broken": Peer(broken, "torch")})
    with pytest.raises(RuntimeError, match=f"broken broke the device at {BIASES.name}"):
        rehearse(tmp_path, "--skip-tests", "--shapes", BIASES.name)
    (numbers,) = tmp_path.glob("*.json")
    assert "illegal memory access" in json.loads(numbers.read_text())["why_not_finished"]


def test_timings_are_interleaved():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abcd"}
    timings = timing.interleaved(runs, CPU, rounds=12)
    rounds = [tuple(calls[i : i + 4]) for i in range(4 * timing.WARMUP, len(calls), 4)]
    assert len(rounds) == 12 and all(sorted(r) == list("abcd") for r in rounds) and len(set(rounds)) > 1
    assert all(t.runs == 12 and t.p20 <= t.ms <= t.p80 for t in timings.values())


def test_a_time_limit_ends_work_in_the_middle():
    with pytest.raises(timing.OutOfTime), timing.time_limit(0.02):
        while True:
            pass
    with pytest.raises(timing.OutOfTime), timing.time_limit(0):
        pytest.fail("no time, and yet it ran")


def test_goals_from_rows():
    def row(name, ms, **figures):
        return {
            "implementation": OURS,
            "pass": name,
            "shape": MAIN.name,
            "routing": "uniform",
            "dtype": "bfloat16",
            "ms": ms,
        } | figures

    assert all(goal.met is None for goal in goals([]))
    rows = [
        row(INFERENCE, 4.0, tflops=600.0), row(FORWARD, 4.4, tflops=560.0), row(DX, 9.0, tflops=519.0), row(FULL, 15.0, tflops=490.0),
        row("kernel topk_route", 0.1, share_of_copy=0.81), row("kernel plan_dispatch", 0.05), row("kernel combine", 0.45),
        row(DX, 8.9) | {"implementation": "liger-kernel"},
    ]  # fmt: skip
    assert [goal.met for goal in goals(rows)] == [True, False, True, True, False, True, False]
    assert "liger-kernel" in goals(rows)[-1].measured
    rows[-1]["ms"] = 9.1
    assert goals(rows)[-1].met


def test_tuning_tries_neighbours_and_leaves_the_table_as_it_was():
    before = {name: dict(getattr(tuning, name)) for name in ("WIDE", "WITHOUT_TMA", "FLOAT32")}
    proposals = list(tune.tune(torch.bfloat16, CPU, lambda: 60.0, GATED))
    assert sorted(p.product for p in proposals) == sorted(tuning.PRODUCTS)
    for proposal in proposals:
        assert proposal.ms <= proposal.present_ms and len(proposal.tried) > 5 and not proposal.refused
        assert eval("{" + proposal.text + "\n}", {"Blocks": tuning.Blocks}) == {proposal.product: proposal.blocks}
    assert before == {name: dict(getattr(tuning, name)) for name in before}
    present = tuning.WIDE["plain"]
    for candidate in neighbours(present, "plain"):
        assert candidate.m == present.m and sum(a != b for a, b in zip(candidate, present, strict=True)) == 1
    assert table_of("plain", torch.bfloat16, 128, tuning.CHIPS["sm_80"]) == "WITHOUT_TMA"
    with pytest.raises(KeyError), patched("WIDE", "plain", tuning.Blocks(1, 2, 3)):
        raise KeyError
    assert tuning.WIDE["plain"] == present


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shapes", "nope"], "--shapes: 'nope' not among toy-gated"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--minutes", "0"], "--minutes must be a number above 0"),
        (["--device", "tpu"], "--device must be auto, cpu or cuda"),
    ],
)
def test_bad_options_are_one_line(capsys, tmp_path, arguments, message):
    assert gpu.main(["--device", "cpu", "--skip-tests", "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_program_needs_no_package_of_the_command_line():
    blocked = (
        "typer",
        "rich",
        "jinja2",
        "matplotlib",
        "transformers",
        "safetensors",
        "sklearn",
        "pytest",
        "hypothesis",
        "triton",
    )
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import ironmoe.bench.gpu"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


class TestCommandLine:
    """``ironmoe bench``."""

    @pytest.fixture
    def run(self):
        cli = pytest.importorskip("ironmoe.bench.cli")
        runner = pytest.importorskip("typer.testing").CliRunner()
        return lambda *arguments: runner.invoke(cli.app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})

    def test_roofline(self, run):
        everything, one = run("roofline"), run("roofline", "--shapes", "olmoe")
        assert everything.exit_code == 0 and all(shape.name in everything.output for shape in SHAPES)
        assert one.exit_code == 0 and "hidden gradient" in one.output and MAIN.name not in one.output

    def test_gpu(self, run, tmp_path):
        result = run("gpu", "--device", "cpu", "--skip-tests", "--shapes", BIASES.name, "--out", tmp_path)
        assert result.exit_code == 0 and len(list(tmp_path.glob("*.json"))) == 1

    @pytest.mark.parametrize(
        "arguments", [("roofline", "--shapes", "x"), ("gpu", "--device", "cpu", "--dtype", "x"), ("kernels", "--only", "x")]
    )
    def test_bad_options_are_one_line(self, run, arguments):
        result = run(*arguments)
        assert result.exit_code == 2 and result.output.startswith("ironmoe: ") and result.output.count("\n") == 1

    @pytest.mark.skipif(find_spec("pytest_benchmark") is None, reason="needs pytest-benchmark")
    def test_kernels(self, tmp_path, monkeypatch):
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark measures nothing under xdist
        from ironmoe.bench.kernels_command import run_bench_kernels

        assert run_bench_kernels("topk_route,plan_dispatch", 0.001, tmp_path / "out.json") == 0
        measured = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
        assert {b["group"] for b in measured} == {"topk_route", "plan_dispatch"}
