"""What is measured on a GPU, rehearsed on CPU in this process: layers, blocks, checks, attacks. ``test_gpu_run.py`` has the run."""

import json
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from ironmoe.bench import peers, timing
from ironmoe.bench.gpu import attack, blocks, checks, measure, tune
from ironmoe.bench.gpu.journal import Journal, Pen, tables
from ironmoe.bench.gpu.measure import MOVERS, PROFILE, Case
from ironmoe.bench.gpu.observe import Clocks
from ironmoe.bench.gpu.report import goals, wrong
from ironmoe.bench.passes import DX, FORWARD, FULL, INFERENCE, UNFROZEN
from ironmoe.bench.peers import DENSE, OURS, Peer, errors, ironmoe, reference
from ironmoe.bench.roofline import MOVES_ROWS
from ironmoe.bench.shapes import MAIN, REHEARSAL, SHAPES, make_problem
from ironmoe.kernels import tuning

CPU = torch.device("cpu")
GATED, BIASES = REHEARSAL
TIMED_ON_CPU = (INFERENCE, FORWARD, DX, FULL, UNFROZEN)
FLOAT32 = torch.float32


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "run.jsonl")


def measure_case(journal, shape, routing="uniform", dtype=torch.bfloat16, seconds=60.0, without=()):
    """(whether it is complete, the tables of everything that is in the journal)."""
    clock, pen = timing.Clock(seconds), Pen(journal, "a case")
    case = Case(shape, routing, dtype, CPU, clock, pen, rounds=2, without=without)
    return case.measure(Clocks()), tables(journal.entries())


@pytest.mark.parametrize(("shape", "routing"), [(GATED, "zipf"), (BIASES, "uniform")])
def test_a_case_writes_what_it_measured(journal, shape, routing):
    complete, found = measure_case(journal, shape, routing)
    assert complete
    for name in (OURS, "torch grouped_mm", DENSE):
        here = [row for row in found["rows"] if row["implementation"] == name]
        assert {row["pass"] for row in here} >= set(TIMED_ON_CPU), name
    assert {r["pass"] for r in found["rows"] if "gb_per_s" in r} == {f"kernel {name}" for name in (*MOVES_ROWS, "linf_step")}
    for row in found["rows"]:
        assert (row["shape"], row["routing"], row["dtype"]) == (shape.name, routing, "bfloat16")
        assert 0 < row["p20"] <= row["ms"] <= row["p80"] and row["runs"] == 2
        assert row["pass"].startswith("kernel") or row["tflops"] > 0
        if row["implementation"] != DENSE and not row["pass"].startswith("kernel"):
            assert 0 < row["error"] <= row["allowed"] and row["agrees"]
    assert any("no kernel times" in note["why"] for note in found["notes"]) and found["kernels"] == []


def test_a_case_goes_on_where_it_was(journal):
    measure_case(journal, BIASES)
    lines = journal.path.read_text().splitlines()
    cut = next(i for i, line in enumerate(lines) if f'"part": "{FULL}"' in line and '"kind": "part"' in line)
    before = lines[:cut]
    journal.path.write_text("\n".join([*before, lines[cut][: len(lines[cut]) // 2]]))  # killed while it wrote
    complete, found = measure_case(journal, BIASES)
    parts = [entry["part"] for entry in journal.entries() if entry["kind"] == "part"]
    assert complete and [part for part in parts if part not in (measure.CHECK, "notes")] == [*TIMED_ON_CPU, MOVERS, PROFILE]
    assert journal.path.read_text().splitlines()[: len(before)] == before
    places = [(row["implementation"], row["pass"]) for row in found["rows"]]
    assert len(places) == len(set(places))
    assert measure_case(journal, BIASES)[0] and tables(journal.entries()) == found  # nothing is left to do


def test_time_that_is_over_is_said(journal):
    complete, found = measure_case(journal, BIASES, seconds=0.0)
    assert not complete and found["rows"] == [] and "took longer" in found["notes"][0]["why"]


@pytest.mark.parametrize("problem", [make_problem(s, r, FLOAT32, CPU) for s, r in [(GATED, "zipf"), (BIASES, "half_empty")]])
def test_everyone_here_agrees_with_the_reference(problem):
    correct = reference(problem, sample=17)
    for name, peer in {OURS: peers.IRONMOE, **peers.PEERS}.items():
        if peer.why_not(problem) is None:
            found = errors(peer.build, problem, correct)
            assert {"y", "x", "gates", "w_in", "x with frozen weights", "y in inference"} <= set(found)
            assert peers.disagreement(found, FLOAT32) is None, (name, found)


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


@pytest.mark.parametrize("build", [scaled, one_row, without_gates, not_finite])
def test_a_wrong_peer_is_timed_and_shown_as_wrong(journal, monkeypatch, build):
    monkeypatch.setattr(measure, "PEERS", {"wrong": Peer(build, "torch")})
    _, found = measure_case(journal, BIASES, dtype=FLOAT32)
    (note,) = [note for note in found["notes"] if note["implementation"] == "wrong"]
    assert "disagrees with the reference in" in note["why"]
    rows = [row for row in found["rows"] if row["implementation"] == "wrong"]
    assert {row["pass"] for row in rows} == set(TIMED_ON_CPU)
    for row in rows:
        assert row["agrees"] is False and (row["error"] is None or row["error"] > row["allowed"])
    assert all(row["agrees"] for row in found["rows"] if row["implementation"] == OURS and "agrees" in row)
    assert not wrong({**found, "tests": None, "jobs": []}, asked_for_tests=False)  # it is not ours


def test_we_are_timed_and_shown_as_wrong(journal, monkeypatch):
    monkeypatch.setattr(measure, "IRONMOE", Peer(scaled, "torch"))
    _, found = measure_case(journal, BIASES, dtype=FLOAT32)
    ours = [row for row in found["rows"] if row["implementation"] == OURS and "agrees" in row]
    assert len(ours) == len(TIMED_ON_CPU) and not any(row["agrees"] for row in ours)
    (fault,) = wrong({**found, "tests": None, "jobs": []}, asked_for_tests=False)
    assert "disagrees" in fault


def test_a_peer_that_fails_costs_its_own_rows_only(journal, monkeypatch):
    def broken(problem):
        raise ZeroDivisionError("first line\nsecond line")

    absent = Peer(broken, "a_package_nobody_has")
    monkeypatch.setattr(
        measure, "PEERS", {"broken": Peer(broken, "torch"), "absent": absent, "left out": Peer(scaled, "torch")}
    )
    complete, found = measure_case(journal, BIASES, without=("left out",))
    why = {note["implementation"]: note["why"] for note in found["notes"]}
    assert why["broken"] == "check: ZeroDivisionError: first line" and why["absent"] == "a_package_nobody_has is not installed"
    assert complete and {row["implementation"] for row in found["rows"]} == {OURS, DENSE}


def test_a_broken_device_ends_the_process_with_its_reason_on_disk(journal, monkeypatch):
    def broken(problem):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "PEERS", {"broken": Peer(broken, "torch")})
    with pytest.raises(RuntimeError, match=f"broken broke the device at {BIASES.name}"):
        measure_case(journal, BIASES)
    assert "illegal memory access" in tables(journal.entries())["notes"][-1]["why"]


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


def goal_row(name, ms, **figures):
    place = {"shape": MAIN.name, "routing": "uniform", "dtype": "bfloat16"}
    return {"implementation": OURS, "pass": name, **place, "ms": ms, **figures}


def test_goals_from_rows():
    assert all(goal.met is None for goal in goals([]))
    rows = [
        goal_row(INFERENCE, 4.0, tflops=600.0), goal_row(FORWARD, 4.4, tflops=560.0), goal_row(DX, 9.0, tflops=519.0),
        goal_row(FULL, 15.0, tflops=490.0), goal_row("kernel topk_route", 0.1, share_of_copy=0.81),
        goal_row("kernel plan_dispatch", 0.05), goal_row("kernel combine", 0.45), goal_row(DX, 8.9) | {"implementation": "liger-kernel"},
    ]  # fmt: skip
    assert [goal.met for goal in goals(rows)] == [True, False, True, True, False, True, False]
    assert "liger-kernel" in goals(rows)[-1].measured
    rows[-1]["agrees"] = False  # who computes something else is nobody to beat
    assert goals(rows)[-1].met is None
    rows[-1] |= {"agrees": True, "ms": 9.1}
    assert goals(rows)[-1].met
    for row in rows[:4]:
        row["agrees"] = False  # and neither do we beat anybody then
    assert not any(goal.met for goal in goals(rows))


def test_tuning_tries_neighbours_and_leaves_the_table_as_it_was(journal):
    before = {name: dict(getattr(tuning, name)) for name in ("WIDE", "WITHOUT_TMA", "FLOAT32")}
    assert tune.tune(torch.bfloat16, CPU, lambda: 60.0, Pen(journal, "tune"), GATED, rounds=2)
    found = tables(journal.entries())["tuning"]
    assert sorted(row["product"] for row in found) == sorted(tuning.PRODUCTS)
    for row in found:
        assert row["ms"] <= row["present_ms"] and len(row["tried"]) > 5 and not row["refused"]
        rows = eval("{" + row["text"] + "\n}", {"Blocks": tuning.Blocks})
        assert rows == {row["product"]: tuning.Blocks(**row["blocks"])}
    assert before == {name: dict(getattr(tuning, name)) for name in before}
    assert tune.table_of("plain", torch.bfloat16, 128, tuning.CHIPS["sm_80"]) == "WITHOUT_TMA"
    with pytest.raises(KeyError), tune.patched("WIDE", "plain", tuning.Blocks(1, 2, 3)):
        raise KeyError
    assert tuning.WIDE["plain"] == before["WIDE"]["plain"]


@pytest.mark.parametrize(
    ("product", "pairs"), [("plain", {"n split", "k stages", "n warps"}), ("weight_gradient", {"m warps", "m n"})]
)
def test_neighbours_differ_in_one_field_or_in_two_that_belong_together(product, pairs):
    present = tuning.Blocks(128, 128, 64, warps=8, stages=4, split=2)
    changes = [
        {name for name, a, b in zip(present._fields, candidate, present, strict=True) if a != b}
        for candidate in tune.neighbours(present, product)
    ]
    assert {1, 2} == {len(changed) for changed in changes}
    together = {" ".join(name for name in present._fields if name in changed) for changed in changes if len(changed) == 2}
    assert {" ".join(sorted(pair.split())) for pair in pairs} <= {" ".join(sorted(pair.split())) for pair in together}
    assert product == "weight_gradient" or not any("m" in changed for changed in changes)


def test_former_blocks_are_timed_beside_the_present_ones(journal, monkeypatch):
    unknown, same = ({"no_such_field": 1}, DX), ({"stages": tuning.WIDE["gated"].stages}, INFERENCE)
    former = {"weight_gradient": ({"stages": 2}, FULL), "plain": unknown, "gated": same}
    monkeypatch.setattr(blocks, "FORMER_BLOCKS", former)
    before = dict(tuning.WIDE)
    assert blocks.compare_blocks(torch.bfloat16, CPU, lambda: 60.0, Pen(journal, "blocks"), GATED, rounds=2)
    found = tables(journal.entries())["blocks"]
    assert [row["pass"] for row in found if "ms" in row] == ["by itself", FULL] and before == tuning.WIDE
    assert found[0]["former"] == "stages 2" and found[0]["ms"] > 0 and found[0]["former_ms"] > 0
    assert "no no_such_field" in found[2]["why"] and "has the former blocks" in found[3]["why"]


def test_blocks_that_reach_no_launch_are_not_compared(journal, monkeypatch, device):
    """As where a cache of compiled kernels does not ask for the blocks again."""
    monkeypatch.setattr(blocks, "FORMER_BLOCKS", {"plain": ({"k": 16}, INFERENCE)})
    compare = partial(
        blocks.compare_blocks, FLOAT32, torch.device(device), lambda: 60.0, shape=BIASES._replace(tokens=4), rounds=1
    )
    assert compare(pen=Pen(journal, "blocks"))
    monkeypatch.setattr(blocks, "_launched", lambda run: ["the same"])
    assert compare(pen=Pen(journal, "blocks again"))
    found = tables(journal.entries())["blocks"]
    assert [("ms" in row) for row in found] == [True, True, False] and "reaches no launch" in found[2]["why"]


@pytest.mark.parametrize("differs", [False, True])
def test_the_same_bits_are_checked(journal, monkeypatch, differs):
    if differs:
        layers = iter(range(100))
        monkeypatch.setattr(checks, "ironmoe", lambda problem: lambda: ironmoe(problem)() + next(layers) * 1e-3)
    assert checks.check_bits(BIASES, torch.bfloat16, CPU, lambda: 60.0, Pen(journal, "bits"))
    found = tables(journal.entries())["checks"]
    assert len(found) == 2 and all(row["passed"] is not differs for row in found)
    assert all("y" in row["why"] for row in found) is differs


@pytest.mark.parametrize(
    ("output", "status", "passed", "why"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, True, ""),
        ("========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors", 99, False, "3 errors; the first: Invalid"),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error)", 99, False, "1 errors"),
        ("no device", 1, None, "exit status 1: no device"),
    ],
)
def test_what_the_sanitizer_says(tmp_path, journal, monkeypatch, output, status, passed, why):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(checks, "TOOLS", ("memcheck",))
    assert checks.sanitize(torch.bfloat16, lambda: 60.0, Pen(journal, "sanitizer"))
    (row,) = tables(journal.entries())["checks"]
    assert row["passed"] is passed and why in row["why"] and "memcheck" in row["check"]


def test_attacks_are_measured(journal, monkeypatch):
    monkeypatch.setattr(attack, "RUNS", 1)
    monkeypatch.setattr(attack, "STEPS", 2)
    assert attack.measure_attack(attack.REHEARSAL_SIZE, torch.bfloat16, CPU, lambda: 120.0, Pen(journal, "attack"))
    found = {row["way"]: row for row in tables(journal.entries())["attack"]}
    assert set(found) == {attack.EAGER, attack.ATTACK, attack.COMPILED}
    for row in found.values():
        assert row["images_per_s"] == pytest.approx(1e3 * row["images"] / row["ms"])
    assert found[attack.COMPILED]["same_pixels"] > 0.9


def test_the_program_needs_no_package_of_the_command_line():
    blocked = (
        "typer",
        "rich",
        "jinja2",
        "matplotlib",
        "transformers",
        "safetensors",
        "sklearn",
        "mlxtend",
        "pytest",
        "hypothesis",
        "triton",
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); import ironmoe.bench.gpu.__main__, ironmoe.bench.gpu.child"
    )
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
        result = run("gpu", "--device", "cpu", "--only", "bits", "--out", tmp_path)
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
