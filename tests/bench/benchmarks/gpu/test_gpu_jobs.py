"""The jobs beside the layers, rehearsed on CPU in this process: blocks, bits, sanitizer,
attacks."""

import math
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ironmoe.bench.benchmarks import block_tables
from ironmoe.bench.benchmarks.gpu.run_log import Pen, RunLog, tables
from ironmoe.bench.benchmarks.gpu.tasks import attack, blocks, checks, tune
from ironmoe.bench.benchmarks.gpu.tasks.neighbours import neighbours
from ironmoe.bench.benchmarks.gpu.tasks.pool import in_processes
from ironmoe.bench.benchmarks.passes import FULL, INFERENCE
from ironmoe.bench.benchmarks.peers import ironmoe
from ironmoe.bench.benchmarks.shapes import MAIN, REHEARSAL
from ironmoe.bench.common import timing
from ironmoe.kernels import tuning

CPU = torch.device("cpu")
GATED, BIASES = REHEARSAL
FLOAT32 = torch.float32


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_log(tmp_path):
    return RunLog(tmp_path / "run.jsonl")


def test_tuning_tries_neighbours_and_leaves_the_table_as_it_was(run_log):
    before = {name: dict(getattr(tuning, name)) for name in ("WIDE", "WITHOUT_TMA", "FLOAT32")}
    assert tune.tune(torch.bfloat16, CPU, lambda: 60.0, Pen(run_log, "tune"), GATED, rounds=2)
    found = tables(run_log.entries())["tuning"]
    assert sorted(row["product"] for row in found) == sorted(tuning.PRODUCTS)
    for row in found:
        assert row["ms"] <= row["present_ms"] and len(row["tried"]) > 5 and not row["refused"]
        rows = eval("{" + row["text"] + "\n}", {"Blocks": tuning.Blocks})
        assert rows == {row["product"]: tuning.Blocks(**row["blocks"])}
    assert before == {name: dict(getattr(tuning, name)) for name in before}
    assert (
        block_tables.table_of("plain", torch.bfloat16, 128, tuning.CHIPS["sm_80"]) == "WITHOUT_TMA"
    )
    with pytest.raises(KeyError), block_tables.patched("WIDE", "plain", tuning.Blocks(1, 2, 3)):
        raise KeyError
    assert tuning.WIDE["plain"] == before["WIDE"]["plain"]


@pytest.mark.parametrize(
    ("product", "pairs"),
    [("plain", {"n split", "k stages", "n warps"}), ("weight_gradient", {"m warps", "m n"})],
)
def test_neighbours_differ_in_one_field_or_in_two_that_belong_together(product, pairs):
    present = tuning.Blocks(128, 128, 64, warps=8, stages=4, split=2)
    changes = [
        {name for name, a, b in zip(present._fields, candidate, present, strict=True) if a != b}
        for candidate in neighbours(present, product)
    ]
    assert {1, 2} == {len(changed) for changed in changes}
    together = {
        " ".join(name for name in present._fields if name in changed)
        for changed in changes
        if len(changed) == 2
    }
    assert {" ".join(sorted(pair.split())) for pair in pairs} <= {
        " ".join(sorted(pair.split())) for pair in together
    }
    assert product == "weight_gradient" or not any("m" in changed for changed in changes)
    assert not any(changed & {"box", "preload"} for changed in changes)  # which change nothing here


def test_switches_are_tried_where_they_change_something():
    present = tuning.Blocks(128, 128, 64)
    assert present._replace(box=not present.box) in neighbours(present, "gated")
    assert present._replace(preload=not present.preload) in neighbours(present, "hidden_gradient")


def test_candidates_are_compiled_ahead_in_processes(monkeypatch):
    """Every candidate of a product is run once, part by part; whatever fails, hangs or is not
    reached costs itself.
    """
    ran = []
    _, chip, rows = tune.work_of("plain", GATED, FLOAT32, CPU)

    def note():
        ran.append(tuning.FLOAT32["plain"])
        raise ValueError("too many registers")

    monkeypatch.setattr(tune, "work_of", lambda *a: (note, chip, rows))
    for part in range(tune.PARTS):
        tune.compile_part(("plain", GATED, FLOAT32, "cpu", part))
    assert sorted(ran) == sorted(neighbours(tuning.FLOAT32["plain"], "plain"))
    assert in_processes(math.log, [1.0, -1.0, 2.0], workers=2, seconds=60.0) == 3
    start = time.monotonic()
    assert (
        in_processes(time.sleep, [100.0], workers=1, seconds=0.5) == 0
        and time.monotonic() - start < 50
    )
    assert (
        in_processes(time.sleep, [], workers=1, seconds=1.0)
        == in_processes(time.sleep, [0.0], 0, 1.0)
        == 0
    )


@pytest.mark.parametrize(
    ("chip", "dtype", "changed"),
    [
        ("sm_90", torch.bfloat16, set(blocks.SHOWN_BY)),
        ("sm_100", torch.bfloat16, {"gated", "activated", "weight_gradient"}),
        ("sm_80", torch.bfloat16, set()),
        ("sm_90", FLOAT32, set()),
    ],
)
def test_what_has_other_blocks_than_before(chip, dtype, changed):
    with tuning.assume(tuning.CHIPS[chip]):
        found = {name: blocks._change(name, MAIN, dtype, CPU) for name in blocks.SHOWN_BY}
    assert {name for name, change in found.items() if change} == changed
    for change in filter(None, found.values()):
        assert change.present in getattr(tuning, change.table).values()


def test_former_blocks_are_timed_beside_the_present_ones(run_log, monkeypatch):
    former = tuning.WIDE["weight_gradient"]._replace(stages=2)
    table = {"weight_gradient": former, "gated": tuning.WIDE["gated"]}
    monkeypatch.setattr(blocks, "FORMER_BLOCKS", {"WIDE": table})
    before, compare = dict(tuning.WIDE), partial(blocks.compare_blocks, shape=GATED, rounds=2)
    for _ in range(2):  # the second one has nothing left to do
        assert compare(torch.bfloat16, CPU, lambda: 60.0, Pen(run_log, "blocks"))
    found = tables(run_log.entries())["blocks"]
    assert [row["pass"] for row in found] == ["by itself", FULL] and before == tuning.WIDE
    for row in found:
        assert (row["product"], row["former"]) == ("weight_gradient", "stages 2")
        assert row["ms"] > 0 and row["former_ms"] > 0
    for _ in range(2):
        assert compare(FLOAT32, CPU, lambda: 60.0, Pen(run_log, "float32"))
    assert "have changed" in tables(run_log.entries())["blocks"][2]["why"]
    assert len(tables(run_log.entries())["blocks"]) == 3


def test_blocks_that_reach_no_launch_are_not_compared(run_log, monkeypatch, device):
    """As where a cache of compiled kernels does not ask for the blocks again."""
    former = {"WIDE": {"plain": tuning.WIDE["plain"]._replace(k=16)}}
    monkeypatch.setattr(blocks, "FORMER_BLOCKS", former)
    monkeypatch.setattr(blocks, "SHOWN_BY", {"plain": INFERENCE})
    monkeypatch.setattr(timing, "WARMUP", 0)
    compare = partial(
        blocks.compare_blocks,
        torch.float16,
        torch.device(device),
        lambda: 60.0,
        shape=BIASES._replace(tokens=4, hidden=16, num_experts=1, top_k=1),
        rounds=1,
    )
    assert compare(pen=Pen(run_log, "blocks"))
    monkeypatch.setattr(blocks, "_launched", lambda run: ["the same"])
    assert compare(pen=Pen(run_log, "blocks again"))
    found = tables(run_log.entries())["blocks"]
    assert [("ms" in row) for row in found] == [True, True, False] and "reaches no launch" in found[
        2
    ]["why"]


@pytest.mark.parametrize("differs", [False, True])
def test_the_same_bits_are_checked(run_log, monkeypatch, differs):
    if differs:
        layers = iter(range(100))
        monkeypatch.setattr(
            checks, "ironmoe", lambda problem: lambda: ironmoe(problem)() + next(layers) * 1e-3
        )
    assert checks.check_bits(BIASES, torch.bfloat16, CPU, lambda: 60.0, Pen(run_log, "bits"))
    found = tables(run_log.entries())["checks"]
    assert len(found) == 2 and all(row["passed"] is not differs for row in found)
    assert all("y" in row["why"] for row in found) is differs


@pytest.mark.parametrize(
    ("output", "status", "passed", "why"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, True, ""),
        (
            "========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors",
            99,
            False,
            "3 errors; the first: Invalid",
        ),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error)", 99, False, "1 errors"),
        ("no device", 1, None, "exit status 1: no device"),
    ],
)
def test_what_the_sanitizer_says(tmp_path, run_log, monkeypatch, output, status, passed, why):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(checks, "TOOLS", ("memcheck",))
    assert checks.sanitize(torch.bfloat16, lambda: 60.0, Pen(run_log, "sanitizer"))
    (row,) = tables(run_log.entries())["checks"]
    assert row["passed"] is passed and why in row["why"] and "memcheck" in row["check"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_start_again_where_they_started(monkeypatch, dtype):
    """And a graph's replays, for which calls of the step stand in here, are those steps."""
    monkeypatch.setattr(attack, "STEPS", 2)
    model, images, labels = attack._prepare(attack.REHEARSAL_SIZE, CPU)
    steps = attack.Steps(model.to(dtype), images, labels, dtype)
    stream, no_block = SimpleNamespace(wait_stream=lambda other: None), lambda *_: nullcontext()
    for name, stand_in in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": no_block,
        "graph": no_block,
        "CUDAGraph": lambda: SimpleNamespace(replay=steps.step),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    found = steps.eager()
    assert torch.equal(steps.eager(), found) and torch.equal(steps.graphed()(), found)
    distance = (found - images).abs().max().item()
    assert 0.5 * attack.USUAL_EPS < distance <= attack.USUAL_EPS * (1 + 1e-6) and not torch.equal(
        found, steps.start
    )


def test_attacks_are_measured(run_log, monkeypatch):
    monkeypatch.setattr(attack, "RUNS", 1)
    monkeypatch.setattr(attack, "STEPS", 2)
    assert attack.measure_attack(
        attack.REHEARSAL_SIZE, torch.bfloat16, CPU, lambda: 120.0, Pen(run_log, "attack")
    )
    found = {row["way"]: row for row in tables(run_log.entries())["attack"]}
    assert set(found) == {attack.EAGER, attack.AS_USERS_CALL_IT, attack.COMPILED}
    for row in found.values():
        assert row["images_per_s"] == pytest.approx(1e3 * row["images"] / row["ms"])
    assert found[attack.COMPILED]["same_pixels"] > 0.9
