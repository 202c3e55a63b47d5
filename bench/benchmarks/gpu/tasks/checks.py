"""Two checks that need a real GPU: the same bits in every run at full size, and NVIDIA's sanitizer
on a small layer.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from glob import glob
from typing import Any

import torch
from torch import Tensor

from ironmoe.bench.benchmarks.gpu.run_log import Pen
from ironmoe.bench.benchmarks.peers import ironmoe
from ironmoe.bench.benchmarks.shapes import Problem, Shape, make_problem
from ironmoe.bench.common.dtypes import dtype_name
from ironmoe.bench.common.timing import OutOfTime, time_limit

RUNS = 5
# full tiles and odd ends, 100 rows an expert
SANITIZED = Shape("sanitized", 200, 64, 192, 4, 2, activation="gelu", bias=True)
TOOLS = ("memcheck", "racecheck", "initcheck")
SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)")
Bits = dict[str, Tensor]


def check_bits(
    shape: Shape, dtype: torch.dtype, device: torch.device, left: Callable[[], float], pen: Pen
) -> bool:
    """Check that forward and gradients have the same bits in RUNS runs, and with frozen weights as
    with trainable ones.

    Returns:
        True if there was time for all.
    """
    problem = make_problem(shape, "uniform", dtype, device)
    checks: dict[str, Callable[[], list[str]]] = {
        f"same bits in {RUNS} runs": partial(differing_runs, problem),
        "same bits of dX for frozen and trainable weights": partial(differing_when_frozen, problem),
    }
    for name, differing in checks.items():
        if name in pen.done:
            continue

        pen.begin(name, "ironmoe")
        try:
            with time_limit(left()):
                wrong = differing()
        except OutOfTime:
            return False
        why = f"differing: {', '.join(wrong)}" if wrong else ""
        pen.finish(name, checks=[_row(name, shape.name, dtype, not wrong, why)])

    return True


def results(problem: Problem) -> Bits:
    """y and the gradients of everything that requires grad, as integers: so NaN equals NaN, and −0
    differs from 0."""
    y = ironmoe(problem)()
    wanted = {name: leaf for name, leaf in problem.leaves.items() if leaf.requires_grad}
    found = {
        "y": y.detach(),
        **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), problem.dy), strict=True)),
    }
    integers = {2: torch.int16, 4: torch.int32}
    return {name: result.view(integers[result.dtype.itemsize]) for name, result in found.items()}


def differing_runs(problem: Problem) -> list[str]:
    """Names of the results that were not the same in every run."""
    first, differing = results(problem), set()
    for _ in range(RUNS - 1):
        again = results(problem)
        differing |= {name for name in first if not torch.equal(first[name], again[name])}
    return sorted(differing)


def differing_when_frozen(problem: Problem) -> list[str]:
    """Names of the results that depend on whether the weights require grad."""
    trainable, frozen = results(problem), results(problem.frozen())
    return sorted(name for name in frozen if not torch.equal(frozen[name], trainable[name]))


def small_layer() -> None:
    """What the sanitizer watches: one forward and one backward pass in bfloat16."""
    torch.manual_seed(0)
    results(make_problem(SANITIZED, "uniform", torch.bfloat16, torch.device("cuda")))
    torch.cuda.synchronize()


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer, in PATH or in a folder of CUDA; None if it is in neither."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += ["/usr/local/cuda", *sorted(glob("/usr/local/cuda-*"), reverse=True), "/opt/cuda"]
    folders = [
        f"{home}/{inner}"
        for home in homes
        for inner in ("bin", "compute-sanitizer", "extras/compute-sanitizer")
    ]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )


def sanitize(dtype: torch.dtype, left: Callable[[], float], pen: Pen) -> bool:
    """Run each of TOOLS on ``small_layer``, in a process of its own.

    Returns:
        True if there was time for all.
    """
    tool = find_sanitizer()
    if tool is None:
        why = "it is neither in PATH nor in a folder of CUDA"
        row = _row("compute-sanitizer", SANITIZED.name, dtype, None, why)
        pen.finish("compute-sanitizer", checks=[row])
        return True

    program = [
        sys.executable,
        "-c",
        "from ironmoe.bench.benchmarks.gpu.tasks.checks import small_layer; small_layer()",
    ]
    for name in TOOLS:
        if name in pen.done:
            continue

        pen.begin(name, "ironmoe")
        command = [tool, "--tool", name, "--error-exitcode", "99", *program]
        # Without its own cache torch asks CUDA for every tensor, so that the end of each is the end
        # of an allocation.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            run = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=max(left(), 0.01)
            )
        except subprocess.TimeoutExpired:
            return False

        pen.finish(
            name, checks=[_row(f"compute-sanitizer {name}", SANITIZED.name, dtype, *verdict(run))]
        )

    return True


def verdict(run: "subprocess.CompletedProcess[str]") -> tuple[bool | None, str]:
    """Read the output of the sanitizer.

    Returns:
        (True if it found nothing, None if it could not work; what it said)
    """
    lines = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]
    counts = [int(count) for line in lines for count in SUMMARY.findall(line)]
    if not counts:
        return (
            None,
            f"exit status {run.returncode}: {lines[-1].strip()[:200] if lines else 'no output'}",
        )

    if sum(counts):
        first = next(
            (line for line in lines if line.startswith("=========") and len(line) > 12), lines[0]
        )
        return False, f"{sum(counts)} errors; the first: {first.lstrip('= ')[:200]}"

    return (
        (True, "")
        if run.returncode == 0
        else (None, f"exit status {run.returncode}: {lines[-1].strip()[:200]}")
    )


def _row(
    check: str, shape: str, dtype: torch.dtype, passed: bool | None, why: str
) -> dict[str, Any]:
    return {
        "check": check,
        "shape": shape,
        "dtype": dtype_name(dtype),
        "passed": passed,
        "why": why,
    }
