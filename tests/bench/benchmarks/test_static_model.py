"""The static model of a product against hand counts, and that nothing is faster than its limit."""

import os
import subprocess
import sys
from datetime import datetime
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from ironmoe.bench.benchmarks.estimates import estimate_table
from ironmoe.bench.benchmarks.estimates import measured as measurements
from ironmoe.bench.benchmarks.estimates.block_changes import changed
from ironmoe.bench.benchmarks.estimates.estimate import EstimateError, KernelEstimate
from ironmoe.bench.benchmarks.estimates.measured import measured
from ironmoe.bench.benchmarks.estimates.static_model import (
    MACHINES,
    Machine,
    Product,
    estimate,
    expected_tiles,
)
from ironmoe.bench.benchmarks.gpu import results
from ironmoe.bench.benchmarks.gpu.run_log import Pen
from ironmoe.bench.benchmarks.passes import FORWARD, FULL
from ironmoe.bench.benchmarks.roofline import needed_flops
from ironmoe.bench.benchmarks.shapes import MAIN, SHAPES
from ironmoe.kernels.tuning import CHIPS, Blocks

H100, A100 = MACHINES["sm_90"], MACHINES["sm_80"]
EVEN = Machine(
    "even",
    CHIPS["sm_90"]._replace(processors=128),
    clock=1.0,
    tensor_flops=4096,
    tflops=1e9,
    terabytes=1e9,
)
TILE = Product(
    128,
    128,
    64,
    steps=32,
    programs=1280,
    epilogue_bytes=32_000,
    warps=8,
    registers=128,
    shared=50_000,
    code=1000,
)


@pytest.mark.parametrize(
    ("m", "n", "needed"), [(128, 128, 64), (128, 256, 48), (256, 128, 48), (64, 64, 128)]
)
def test_bytes_from_l2(m, n, needed):
    assert estimate(TILE._replace(m=m, n=n, shared=0), H100).l2_needed == needed
    assert round(H100.l2_rate) == 31 and round(A100.l2_rate) == 38


def test_a_product_by_hand():
    """5120 · 0.8 bytes a clock over 128 SMs are 32; a step of 32,768 bytes is 1024 clocks, its 2²¹
    FLOPs at 4096 are 512."""
    assert EVEN.tensor_rate == 4096 and EVEN.l2_rate == 32
    # the stores, 1000 clocks, are behind 2000 clocks of instructions
    serial = 4 * 280 + 1000 * 8 / 4
    alone, busy = 32 * 1024 + serial, 32 * 1024 + 1000
    two = estimate(TILE, EVEN)
    assert (two.resident, two.waves) == (2, 5.0)
    assert (two.tensor, two.l2, two.serial) == (32 * 0.512, busy * 1e-3, serial * 1e-3)
    assert two.ms == pytest.approx(10 * busy * 1e-6), "two hide each other's serial part"
    one = estimate(TILE._replace(registers=129), EVEN)
    assert (one.resident, one.waves) == (1, 10.0) and one.ms == pytest.approx(10 * alone * 1e-6)
    assert estimate(TILE._replace(programs=1), EVEN).ms == pytest.approx(alone * 1e-6), (
        "one program hides nothing"
    )
    assert estimate(TILE._replace(programs=0), EVEN).ms == 0
    short = estimate(TILE._replace(steps=1, code=8000), EVEN)
    assert short.ms == pytest.approx(10 * (1024 + 1120 + 16_000) / 2 * 1e-6), (
        "two share what they wait for"
    )


def test_what_fits_no_sm_is_refused():
    with pytest.raises(ValueError, match="300000 bytes do not fit on an SM of H100"):
        estimate(TILE._replace(shared=300_000), H100)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_more_is_never_faster_and_nothing_beats_the_limit(machine):
    more = {
        "registers": 40,
        "shared": 30_000,
        "code": 500,
        "epilogue_bytes": 4096,
        "steps": 1,
        "programs": 7,
    }
    for programs in (1, 131, 132, 133, 1000):
        for registers in (40, 80, 120, 160, 200):
            for shared in (0, 40_000, 80_000, 120_000):
                product = TILE._replace(programs=programs, registers=registers, shared=shared)
                here = estimate(product, machine).ms
                assert (
                    here * machine.tflops * 1e9 >= product.programs * product.steps * product.flops
                )
                for field, amount in more.items():
                    assert (
                        estimate(
                            product._replace(**{field: getattr(product, field) + amount}), machine
                        ).ms
                        >= here
                    ), field


@pytest.mark.parametrize(
    ("rows", "experts", "m", "tiles"),
    [(0, 8, 128, 0), (5, 8, 16, 5), (1024, 8, 128, 12), (262_144, 128, 128, 2112)],
)
def test_tiles_of_an_even_routing(rows, experts, m, tiles):
    assert expected_tiles(rows, experts, m) == tiles


def test_blocks_are_read_as_changes_of_the_table():
    product, blocks = changed(MAIN, "weight_gradient n=256 stages=5", H100)
    assert (
        product == "weight_gradient"
        and (blocks.n, blocks.stages) == (256, 5)
        and isinstance(blocks, Blocks)
    )
    for text, message in (
        ("activated stages=3", "no product of qwen3-30b, whose products are gated, plain"),
        ("gated depth=3", "depth=3 is no number for a field of m, n, k"),
        ("gated stages=many", "stages=many is no number"),
    ):
        with pytest.raises(EstimateError, match=message):
            changed(MAIN, text, H100)


@pytest.fixture
def run_of_make_gpu(tmp_path, monkeypatch):
    """The files that a run of ``make gpu`` leaves: ``run(day, device, rows, outcome)``."""

    def run(day, device, rows, outcome="done"):
        clock = SimpleNamespace(strftime=datetime(2026, 12, day).strftime)
        monkeypatch.setattr(results, "time", clock)
        monkeypatch.setattr(results, "describe", lambda _: {"name": device})
        run = results.Results(tmp_path, torch.device("cpu"), torch.bfloat16, 9.0, False)
        case = f"case {MAIN.name} uniform"
        Pen(run.run_log, case).finish(FORWARD, rows=rows)
        if outcome:
            run.run_log.write("end", job=case, outcome=outcome, why="", seconds=40.0)
        run.write(["tune"], "no time for all of tune")

    return run


def test_the_newest_measurement_of_that_machine_stands_beside(
    run_of_make_gpu, tmp_path, monkeypatch
):
    row = {
        "shape": MAIN.name, "sizes": MAIN.sizes, "activation": MAIN.activation, "bias": MAIN.bias,
        "pass": FORWARD,
        "implementation": "ironmoe", "routing": "uniform", "dtype": "bfloat16", "ms": 5.0,
        "p20": 4.9, "p80": 5.1,
        "runs": 20, "host_ms": 0.4, "tflops": 577.0, "share_of_product": 0.73,
        "product_tflops": 790.0, "limit_ms": 3.5,
        "peak_bytes": 1, "saved_bytes": None, "error": 0.012, "allowed": 0.05, "agrees": True,
        "sm_mhz": 1755.0, "watts": 612.0, "celsius": 63.0,
    }  # fmt: skip
    (tmp_path / "cpu.json").write_text("[]")
    (tmp_path / "attacks.json").write_text('{"device": {"name": "NVIDIA H100"}}')
    assert measured(MAIN, FORWARD, H100, tmp_path) is None
    run_of_make_gpu(2, "NVIDIA H200", [row, row | {"routing": "zipf", "ms": 9.0}])
    run_of_make_gpu(1, "NVIDIA H100 80GB HBM3", [row | {"ms": 6.0}])
    run_of_make_gpu(3, "NVIDIA A100-SXM4-80GB", [row | {"ms": 7.0}])
    for day, wrong in enumerate(
        ({"agrees": False}, {"dtype": "float16"}, {"implementation": "moe-ops"}), 4
    ):
        run_of_make_gpu(day, "NVIDIA H100 80GB HBM3", [row | {"ms": 1.0} | wrong])
    run_of_make_gpu(7, "NVIDIA H100 80GB HBM3", [row | {"ms": 1.0}], outcome="")  # a kill
    run_of_make_gpu(8, "NVIDIA H100 80GB HBM3", [row | {"ms": 1.0}], outcome="died")
    assert measured(MAIN, FORWARD, H100, tmp_path) == (5.0, "NVIDIA H200")
    assert measured(MAIN, FORWARD, A100, tmp_path) == (7.0, "NVIDIA A100-SXM4-80GB")
    assert measured(MAIN, FULL, H100, tmp_path) is None
    assert measured(SHAPES[1], FORWARD, H100, tmp_path) is None
    monkeypatch.setattr(measurements, "RESULTS", tmp_path)
    summary = estimate_table._summary(MAIN, FORWARD, H100, [KernelEstimate("all", 4.0, 4.0)])
    tflops = needed_flops(MAIN, FORWARD) * 1e-9 / 5.0
    assert f"measured {tflops:.0f} (NVIDIA H200)" in summary[1]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_command_compares_blocks():
    """In a process of its own: in this one the kernels are interpreted."""
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | {"COLUMNS": "120"}
    command = [
        sys.executable,
        "-m",
        "ironmoe.bench",
        "bench",
        "roofline",
        "--estimate",
        "--shapes",
        "vmoe-b16-e8",
    ]
    command += ["--blocks", "activated stages=2"]
    out = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout
    as_it_is, other = (line for line in out.splitlines() if "up product" in line)
    assert (
        "128×128×64/8/2" in other
        and "128×128×64/8/" in as_it_is
        and "a model, not a measurement" in out
    )
    limit, ms = map(float, as_it_is.split()[-2:])
    assert ms > limit > 0
