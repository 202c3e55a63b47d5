"""What a GPU does meanwhile: kernels of the profiler, compile times, clocks; as far as a machine
without one can tell.
"""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ironmoe.bench.benchmarks.gpu.tasks import observe
from ironmoe.bench.benchmarks.gpu.tasks.observe import (
    Compiled,
    CompileTimes,
    GpuMonitor,
    kernel_times,
    launches_of,
)


def event(name, start, us, device=DeviceType.CUDA, annotation=False):
    span = SimpleNamespace(start=start, elapsed_us=lambda: us)
    return SimpleNamespace(
        name=name, time_range=span, device_type=device, is_user_annotation=annotation
    )


def test_each_launch_of_a_call_has_its_own_time():
    calls = [
        [("matmul", 10.0), ("sum", 1.0), ("matmul", 30.0)],
        [("matmul", 12.0), ("sum", 3.0), ("matmul", 34.0)],
    ]
    events = [
        event(name, 100 * i + j, us)
        for i, call in enumerate(calls)
        for j, (name, us) in enumerate(call)
    ]
    events += [event("aten::mm", 0, 99.0, DeviceType.CPU), event("step", 0, 99.0, annotation=True)]
    found = launches_of(events[::-1], calls=2)  # in the order of time, whatever order they come in
    assert [(x.kernel, x.number, x.us) for x in found] == [
        ("matmul", 1, 11.0),
        ("matmul", 2, 32.0),
        ("sum", 1, 2.0),
    ]
    assert [x.share for x in found] == pytest.approx([22 / 90, 64 / 90, 4 / 90])
    uneven = launches_of([*events, event("memset", 500, 7.0)], calls=2)
    assert (uneven[-1].kernel, uneven[-1].number, uneven[-1].us) == ("memset", 0, 7.0)
    assert launches_of([], calls=2) == [] and kernel_times(lambda: None, torch.device("cpu")) == []


def test_events_of_the_real_profiler_are_understood():
    """Its events on CPU, taken for a GPU's."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            torch.ones(3).add(1)
    events = profiler.events()
    for found in events:
        found.device_type = DeviceType.CUDA
    launches = launches_of(events, calls=2)
    assert {"aten::ones", "aten::add"} <= {
        launch.kernel for launch in launches if launch.number == 1
    }
    assert all(launch.us >= 0 for launch in launches) and sum(
        x.share for x in launches
    ) == pytest.approx(1)


def test_compile_times_are_heard():
    listener = CompileTimes()
    assert listener.summary() == []
    for name, us in (("route_kernel", 1.5e6), ("gather_kernel", 0.5e6)):
        listener(
            src=SimpleNamespace(name=name),
            metadata={},
            metadata_group={},
            times=SimpleNamespace(total=us),
            cache_hit=False,
        )
    listener(
        src=None, metadata={}, metadata_group={}, times=SimpleNamespace(total=9e6), cache_hit=True
    )
    assert listener.summary() == [Compiled(2, 2.0, 1, "route_kernel, 1.5 s")._asdict()]


COMPILES = """
import json, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ironmoe.bench.benchmarks.gpu.tasks.observe import listening

@triton.jit
def add_one(x):
    tl.store(x, tl.load(x) + 1)

before = triton.knobs.compilation.listener
with listening() as compiled:
    for _ in range(2):
        triton.compile(ASTSource(add_one, {"x": "*fp32"}, {}), GPUTarget("cuda", 90, 32))
assert triton.knobs.compilation.listener is before
print(json.dumps(compiled.summary()))
"""


def test_triton_itself_tells_its_compile_times(tmp_path):
    """A real compilation, for a chip that is not here: this is how Triton calls its listener. The
    second one finds the first.
    """
    pytest.importorskip("triton")
    program = tmp_path / "compiles.py"
    program.write_text(COMPILES)
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment
    )
    (row,) = json.loads(run.stdout or run.stderr)
    assert (
        (row["kernels"], row["from_cache"]) == (1, 1)
        and row["seconds"] > 0
        and "add_one" in row["longest"]
    )


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A program of that name which prints what it is told; gives the function that tells it."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(observe, "EVERY", 0.01)

    def tell(line):
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f'#!/bin/sh\ncase "$*" in *--id=GPU-7*) echo "{line}";; *) exit 1;; esac\n'
        )
        program.chmod(0o755)

    return tell


def wait_for_readings(monitor, count):
    deadline = time.monotonic() + 60
    while len(monitor.readings) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_clocks_are_read_while_the_block_runs(nvidia_smi):
    nvidia_smi("1755, 612.5, 63")
    with GpuMonitor("GPU-7") as monitor:
        wait_for_readings(monitor, 3)
        now = time.monotonic()
        assert monitor.since(0.0) == {"sm_mhz": 1755.0, "watts": 612.5, "celsius": 63.0}
        assert monitor.since(now + 100) == {}
    count = len(monitor.readings)
    time.sleep(0.1)
    assert len(monitor.readings) == count >= 3


def test_clocks_that_cannot_be_read_are_left_out(nvidia_smi):
    nvidia_smi("[N/A], 612.5, 63")
    for gpu in ("GPU-7", "GPU-8", None):
        with GpuMonitor(gpu) as monitor:
            time.sleep(0.2)
        assert monitor.since(0.0) == {}
