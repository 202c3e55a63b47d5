"""What ``make gpu`` has measured before, read from the files in bench/results."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ironmoe.bench.benchmarks.estimates.static_model import Machine
from ironmoe.bench.benchmarks.gpu.jobs import CASE, GpuJob
from ironmoe.bench.benchmarks.gpu.report import GOAL_DEVICES
from ironmoe.bench.benchmarks.peers import OURS
from ironmoe.bench.benchmarks.shapes import Shape

RESULTS = Path(__file__).parents[2] / "results"
NEEDED_KEYS = {"date", "device", "rows", "jobs"}


class Measured(NamedTuple):
    """ms: of a pass, as ``make gpu`` measured it; device: the full name of the GPU."""

    ms: float
    device: str


def measured(
    shape: Shape, pass_name: str, machine: Machine, folder: Path | None = None
) -> Measured | None:
    """The newest measurement of the layer in bfloat16 under a uniform routing; None without one.

    It is taken from what the files say, whatever their names. An H200 counts as an H100, which has
    the same processors. Numbers that were wrong and layers that were not measured to the end do not
    count.

    Args:
        folder: RESULTS by default.
    """
    found: dict[tuple[str, str], Measured] = {}
    for path in (folder or RESULTS).glob("*.json"):
        results = json.loads(path.read_text())
        if not isinstance(results, dict) or not results.keys() >= NEEDED_KEYS:
            continue
        if not _is_of(machine, results) or not _is_finished(shape, results):
            continue
        for row in results["rows"]:
            if _counts(row, shape, pass_name):
                ms, device = float(row["ms"]), results["device"]["name"]
                found[results["date"], path.name] = Measured(ms, device)
    return found[max(found)] if found else None


def _is_of(machine: Machine, results: dict[str, Any]) -> bool:
    devices = GOAL_DEVICES if machine.name in GOAL_DEVICES else (machine.name,)
    return any(name in results["device"]["name"] for name in devices)


def _is_finished(shape: Shape, results: dict[str, Any]) -> bool:
    done = {job["job"] for job in results["jobs"] if job["outcome"] == "done"}
    return GpuJob(CASE, shape, "uniform").name in done


def _counts(row: dict[str, Any], shape: Shape, pass_name: str) -> bool:
    wanted = {
        "shape": shape.name,
        "pass": pass_name,
        "implementation": OURS,
        "routing": "uniform",
        "dtype": "bfloat16",
    }
    is_it = all(row.get(name) == value for name, value in wanted.items())
    return is_it and row.get("agrees") is not False and bool(row.get("ms"))
