"""What is measured on a GPU, rehearsed on CPU in this process: layers, blocks, checks, attacks.
``test_gpu_run.py`` has the run.
"""

import pytest
import torch

from ironmoe.bench.benchmarks import peers
from ironmoe.bench.benchmarks.gpu.report import goals, wrong
from ironmoe.bench.benchmarks.gpu.run_log import Pen, RunLog, tables, under_way
from ironmoe.bench.benchmarks.gpu.tasks import measure
from ironmoe.bench.benchmarks.gpu.tasks.entrants import Place
from ironmoe.bench.benchmarks.gpu.tasks.measure import MOVERS, PROFILE, LayerCase
from ironmoe.bench.benchmarks.gpu.tasks.observe import GpuMonitor
from ironmoe.bench.benchmarks.passes import DX, FORWARD, FULL, INFERENCE, UNFROZEN
from ironmoe.bench.benchmarks.peers import DENSE, OURS, Peer, ironmoe
from ironmoe.bench.benchmarks.reference import disagreement, errors, reference
from ironmoe.bench.benchmarks.roofline import MOVES_ROWS
from ironmoe.bench.benchmarks.shapes import MAIN, REHEARSAL, make_problem
from ironmoe.bench.common import timing

CPU = torch.device("cpu")
GATED, BIASES = REHEARSAL
TIMED_ON_CPU = (INFERENCE, FORWARD, DX, FULL, UNFROZEN)
FLOAT32 = torch.float32


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On a busy machine two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_log(tmp_path):
    return RunLog(tmp_path / "run.jsonl")


def measure_case(run_log, shape, routing="uniform", dtype=torch.bfloat16, seconds=60.0, without=()):
    """(whether it is complete, the tables of everything that is in the run log)."""
    countdown, pen = timing.Countdown(seconds), Pen(run_log, "a case")
    place = Place(shape, routing, dtype, CPU)
    case = LayerCase(place, countdown, pen, rounds=2, without=without)
    return case.measure(GpuMonitor()), tables(run_log.entries())


@pytest.fixture(scope="module")
def biases(tmp_path_factory):
    """The run log of one finished case."""
    run_log = RunLog(tmp_path_factory.mktemp("case") / "run.jsonl")
    assert measure_case(run_log, BIASES)[0]
    return run_log


def check_case(found, shape, routing):
    for name in (OURS, "torch grouped_mm", DENSE):
        here = [row for row in found["rows"] if row["implementation"] == name]
        assert {row["pass"] for row in here} >= set(TIMED_ON_CPU), name
    moved = {row["pass"] for row in found["rows"] if "gb_per_s" in row}
    assert moved == {f"kernel {name}" for name in (*MOVES_ROWS, "linf_step")}
    for row in found["rows"]:
        assert (row["shape"], row["routing"], row["dtype"]) == (shape.name, routing, "bfloat16")
        assert 0 < row["p20"] <= row["ms"] <= row["p80"] and row["runs"] == 2
        assert row["pass"].startswith("kernel") or row["tflops"] > 0
        if row["implementation"] != DENSE and not row["pass"].startswith("kernel"):
            assert 0 < row["error"] <= row["allowed"] and row["agrees"]
    assert any("no kernel times" in note["why"] for note in found["notes"])
    assert found["kernels"] == []


def test_a_case_writes_what_it_measured(run_log, biases):
    check_case(tables(biases.entries()), BIASES, "uniform")
    complete, found = measure_case(run_log, GATED, "zipf")
    assert complete
    check_case(found, GATED, "zipf")


def test_a_case_goes_on_where_it_was(run_log, biases):
    lines = biases.path.read_text().splitlines()
    cut = next(
        i
        for i, line in enumerate(lines)
        if f'"part": "{FULL}"' in line and '"kind": "part"' in line
    )
    before = lines[:cut]
    # killed while it wrote
    run_log.path.write_text("\n".join([*before, lines[cut][: len(lines[cut]) // 2]]))
    complete, found = measure_case(run_log, BIASES)
    parts = [entry["part"] for entry in run_log.entries() if entry["kind"] == "part"]
    assert complete and [part for part in parts if part not in (measure.CHECK, "notes")] == [
        *TIMED_ON_CPU,
        MOVERS,
        PROFILE,
    ]
    assert run_log.path.read_text().splitlines()[: len(before)] == before
    places = [(row["implementation"], row["pass"]) for row in found["rows"]]
    assert len(places) == len(set(places))
    # nothing is left to do
    assert measure_case(run_log, BIASES)[0] and tables(run_log.entries()) == found


def test_time_that_is_over_is_said(run_log):
    complete, found = measure_case(run_log, BIASES, seconds=0.0)
    assert not complete and found["rows"] == [] and "took longer" in found["notes"][0]["why"]


@pytest.mark.parametrize(
    "problem",
    [make_problem(s, r, FLOAT32, CPU) for s, r in [(GATED, "zipf"), (BIASES, "half_empty")]],
)
def test_everyone_here_agrees_with_the_reference(problem):
    correct = reference(problem, sample=17)
    for name, peer in {OURS: peers.IRONMOE, **peers.PEERS}.items():
        if peer.why_not(problem) is None:
            found = errors(peer.build, problem, correct)
            assert {"y", "x", "gates", "w_in", "x with frozen weights", "y in inference"} <= set(
                found
            )
            assert disagreement(found, FLOAT32) is None, (name, found)


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


WRONG = {
    build.__name__: Peer(build, "torch") for build in (scaled, one_row, without_gates, not_finite)
}


def test_a_wrong_peer_is_timed_and_shown_as_wrong(run_log, monkeypatch):
    monkeypatch.setattr(measure, "PEERS", WRONG)
    _, found = measure_case(run_log, BIASES, dtype=FLOAT32)
    for name in WRONG:
        (note,) = [note for note in found["notes"] if note["implementation"] == name]
        assert "disagrees with the reference in" in note["why"]
        rows = [row for row in found["rows"] if row["implementation"] == name]
        assert {row["pass"] for row in rows} == set(TIMED_ON_CPU)
        for row in rows:
            assert row["agrees"] is False
            assert row["error"] is None or row["error"] > row["allowed"]
    assert all(
        row["agrees"] for row in found["rows"] if row["implementation"] == OURS and "agrees" in row
    )
    # they are not ours
    assert not wrong({**found, "tests": None, "jobs": []}, asked_for_tests=False)


def test_we_are_timed_and_shown_as_wrong(run_log, monkeypatch):
    monkeypatch.setattr(measure, "IRONMOE", Peer(scaled, "torch"))
    _, found = measure_case(run_log, BIASES, dtype=FLOAT32)
    ours = [row for row in found["rows"] if row["implementation"] == OURS and "agrees" in row]
    assert len(ours) == len(TIMED_ON_CPU) and not any(row["agrees"] for row in ours)
    (fault,) = wrong({**found, "tests": None, "jobs": []}, asked_for_tests=False)
    assert "disagrees" in fault


def test_a_peer_that_fails_costs_its_own_rows_only(run_log, monkeypatch):
    def broken(problem):
        raise ZeroDivisionError("first line\nsecond line")

    absent = Peer(broken, "a_package_nobody_has")
    monkeypatch.setattr(
        measure,
        "PEERS",
        {"broken": Peer(broken, "torch"), "absent": absent, "left out": Peer(scaled, "torch")},
    )
    complete, found = measure_case(run_log, BIASES, without=("left out",))
    why = {note["implementation"]: note["why"] for note in found["notes"]}
    assert (
        why["broken"] == "check: ZeroDivisionError: first line"
        and why["absent"] == "a_package_nobody_has is not installed"
    )
    assert complete and {row["implementation"] for row in found["rows"]} == {OURS, DENSE}


def test_a_broken_device_ends_the_process_with_its_reason_on_disk(run_log, monkeypatch):
    def broken(problem):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "PEERS", {"broken": Peer(broken, "torch")})
    with pytest.raises(RuntimeError, match=f"broken broke the device at {BIASES.name}"):
        measure_case(run_log, BIASES)
    assert "illegal memory access" in tables(run_log.entries())["notes"][-1]["why"]
    assert under_way(run_log.entries(), "a case") == (measure.CHECK, "broken")


def test_timings_are_interleaved():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abcd"}
    timings = timing.interleaved(runs, CPU, rounds=12)
    rounds = [tuple(calls[i : i + 4]) for i in range(4 * timing.WARMUP, len(calls), 4)]
    assert (
        len(rounds) == 12
        and all(sorted(r) == list("abcd") for r in rounds)
        and len(set(rounds)) > 1
    )
    assert all(t.runs == 12 and t.p20 <= t.ms <= t.p80 for t in timings.values())


def test_rounds_without_warm_up_are_all_that_runs():
    """As ``ironmoe bench attacks`` has it: each call takes seconds."""
    calls, rounds = [], []
    samples = timing.samples_in_turns(
        {"a": lambda: calls.append("a")}, CPU, 4, warmup=0, on_round=lambda: rounds.append(1)
    )
    assert len(calls) == len(rounds) == len(samples["a"]) == 4


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
        goal_row(INFERENCE, 4.0, tflops=600.0), goal_row(FORWARD, 4.4, tflops=560.0),
        goal_row(DX, 9.0, tflops=519.0),
        goal_row(FULL, 15.0, tflops=490.0), goal_row("kernel topk_route", 0.1, share_of_copy=0.81),
        goal_row("kernel plan_dispatch", 0.05), goal_row("kernel combine", 0.45),
        goal_row(DX, 8.9) | {"implementation": "liger-kernel"},
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
