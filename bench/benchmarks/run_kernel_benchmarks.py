"""``ironmoe bench kernels``: run ``kernel_benchmarks.py`` under pytest-benchmark."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from ironmoe.bench.common.user_error import UserError

BENCHMARKS = Path(__file__).with_name("kernel_benchmarks.py")
OPERATIONS = (
    "topk_route",
    "plan_dispatch",
    "grouped_matmul",
    "combine",
    "expert_mlp",
    "attack_step",
)


class KernelBenchmarksError(UserError):
    """The benchmarks cannot run as asked; the message is one line and says why."""


def run_bench_kernels(operations: str | None, seconds: float, out: Path | None) -> int:
    """Print a table for each operation.

    Args:
        operations: names out of OPERATIONS, separated by commas; None is all.
        seconds: that each benchmark may take; it makes a few calls in any case.
        out: file for pytest-benchmark's JSON.

    Returns:
        The exit status of pytest.

    Raises:
        KernelBenchmarksError: a name is unknown, or a package or a folder is missing.
    """
    wanted = _known(operations)
    if find_spec("pytest_benchmark") is None:
        raise KernelBenchmarksError(
            "bench kernels needs pytest-benchmark: pip install pytest-benchmark"
        )
    if out is not None and not out.resolve().parent.is_dir():
        raise KernelBenchmarksError(f"--out: there is no folder {out.resolve().parent}")

    command = [*_pytest(), *_choice(wanted, seconds)]
    if out is not None:
        command.append(f"--benchmark-json={out.resolve()}")
    return subprocess.run(command).returncode


def _known(operations: str | None) -> tuple[str, ...]:
    """The operations that are asked for.

    Raises:
        KernelBenchmarksError: there is none of such a name.
    """
    wanted = (
        OPERATIONS if operations is None else tuple(name.strip() for name in operations.split(","))
    )
    if unknown := [name for name in wanted if name not in OPERATIONS]:
        raise KernelBenchmarksError(
            f"--only: {', '.join(map(repr, unknown))} not among {', '.join(OPERATIONS)}"
        )
    return wanted


def _pytest() -> list[str]:
    """pytest on the benchmarks alone: no settings of a project around them, no cache on disk."""
    return [
        *(sys.executable, "-m", "pytest"),
        str(BENCHMARKS),
        "-q",
        *("-c", os.devnull),
        *("--rootdir", str(BENCHMARKS.parent)),
        "--import-mode=importlib",
        *("-p", "no:cacheprovider"),
    ]


def _choice(wanted: tuple[str, ...], seconds: float) -> list[str]:
    """Options of pytest: which benchmarks run, for how long, and what is printed."""
    return [
        *("-k", " or ".join(f"test_{name}" for name in wanted)),
        "--benchmark-only",
        "--benchmark-group-by=group",
        "--benchmark-sort=name",
        "--benchmark-columns=median,iqr,min,max,rounds",
        f"--benchmark-max-time={seconds:g}",
        "--benchmark-min-rounds=3",
        "--benchmark-disable-gc",
    ]
