"""The process of one job. It imports everything, waits for its job on standard input, does it, and
writes what it finds to the run log."""

import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ironmoe.bench.benchmarks.chosen_shapes import shape_of
from ironmoe.bench.benchmarks.gpu.jobs import ATTACK, BITS, BLOCKS, CASE, SANITIZER, GpuJob
from ironmoe.bench.benchmarks.gpu.run_log import Pen, RunLog, end_with_parent
from ironmoe.bench.benchmarks.gpu.tasks.attack import FULL_SIZE, REHEARSAL_SIZE, measure_attack
from ironmoe.bench.benchmarks.gpu.tasks.blocks import compare_blocks
from ironmoe.bench.benchmarks.gpu.tasks.checks import check_bits, sanitize
from ironmoe.bench.benchmarks.gpu.tasks.entrants import Place
from ironmoe.bench.benchmarks.gpu.tasks.measure import LayerCase
from ironmoe.bench.benchmarks.gpu.tasks.observe import GpuMonitor, listening
from ironmoe.bench.benchmarks.gpu.tasks.tune import tune
from ironmoe.bench.benchmarks.shapes import MAIN, REHEARSAL, SHAPES
from ironmoe.bench.common.timing import Countdown

COMPLETE, INCOMPLETE = 0, 3  # exit status: everything is done; the time was over before


def main() -> int:
    """Wait for a job, do it, and return the exit status. If the run ends first, no job comes."""
    end_with_parent()
    if torch.cuda.is_available():
        _import_ahead()
    line = sys.stdin.readline()
    if not line:
        return COMPLETE

    assigned = AssignedJob.from_request(json.loads(line))
    if assigned.device.type == "cpu":
        # a rehearsal: its figures mean nothing, and other threads would only wait for each other
        torch.set_num_threads(1)

    with listening() as compiled, GpuMonitor(_uuid(assigned.device)) as monitor:
        try:
            complete = assigned.do(monitor)
        finally:
            if found := compiled.summary():
                assigned.pen.finish(
                    f"compiled in process {os.getpid()}",
                    compiled=[{"job": assigned.job.name, **found[0]}],
                )

    return COMPLETE if complete else INCOMPLETE


def _import_ahead() -> None:
    """Import what takes seconds and will be needed."""
    for module in ("triton", "transformers.models.mixtral.modeling_mixtral"):
        with suppress(ImportError):
            import_module(module)


def _uuid(device: torch.device) -> str | None:
    """The name of the GPU for nvidia-smi; None on CPU, or where torch does not know it."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{str(uuid).removeprefix('GPU-')}" if uuid else None


@dataclass(frozen=True)
class AssignedJob:
    """A job with everything that it needs in this process.

    rounds: how often each is timed, at most; without: peers that are left out.
    """

    job: GpuJob
    dtype: torch.dtype
    device: torch.device
    countdown: Countdown
    pen: Pen
    rounds: int
    without: list[str]

    @classmethod
    def from_request(cls, request: dict[str, Any]) -> "AssignedJob":
        """``request``: what ``run.py`` has written to standard input."""
        shape = shape_of(request["shape"], (*SHAPES, *REHEARSAL))
        job = GpuJob(request["kind"], shape, request["routing"])
        return cls(
            job=job,
            dtype=getattr(torch, request["dtype"]),
            device=torch.device(request["device"]),
            countdown=Countdown(request["seconds"]),
            pen=Pen(RunLog(Path(request["run_log"])), job.name),
            rounds=request["rounds"],
            without=request["without"],
        )

    def do(self, monitor: GpuMonitor) -> bool:
        """Do the job. True if it is complete."""
        dtype, device = self.dtype, self.device
        left, pen = self.countdown.left, self.pen
        on_gpu = device.type == "cuda"
        kind, shape = self.job.kind, self.job.shape

        if kind == CASE:
            assert shape is not None
            place = Place(shape, self.job.routing, dtype, device)
            case = LayerCase(place, self.countdown, pen, rounds=self.rounds, without=self.without)
            return case.measure(monitor)

        if kind == BITS:
            assert shape is not None
            return check_bits(shape, dtype, device, left, pen)
        if kind == ATTACK:
            size = FULL_SIZE if on_gpu else REHEARSAL_SIZE
            return measure_attack(size, dtype, device, left, pen)
        if kind == SANITIZER:
            return sanitize(dtype, left, pen)

        main = MAIN if on_gpu else REHEARSAL[0]
        if kind == BLOCKS:
            return compare_blocks(dtype, device, left, pen, main, self.rounds)
        return tune(dtype, device, left, pen, main, self.rounds)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # everything is on disk, and what torch and Triton clear away at their end takes seconds
    os._exit(status)
