"""The process of one job: it imports everything, waits for its job on standard input, does it, and
writes what it finds to the journal.
"""

import json
import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ironmoe.bench.benchmarks.gpu.jobs import ATTACK, BITS, BLOCKS, CASE, SANITIZER, Job
from ironmoe.bench.benchmarks.gpu.journal import Journal, Pen, end_with_parent
from ironmoe.bench.benchmarks.gpu.tasks.attack import FULL_SIZE, REHEARSAL_SIZE, measure_attack
from ironmoe.bench.benchmarks.gpu.tasks.blocks import compare_blocks
from ironmoe.bench.benchmarks.gpu.tasks.checks import check_bits, sanitize
from ironmoe.bench.benchmarks.gpu.tasks.measure import Case
from ironmoe.bench.benchmarks.gpu.tasks.observe import Clocks, listening
from ironmoe.bench.benchmarks.gpu.tasks.tune import tune
from ironmoe.bench.benchmarks.shapes import MAIN, REHEARSAL, SHAPES
from ironmoe.bench.common.timing import Clock

COMPLETE, INCOMPLETE = 0, 3  # exit status: everything done; time was over first


def main() -> int:
    """Exit status. No job, no work: the run was over before."""
    end_with_parent()
    if torch.cuda.is_available():
        _import_ahead()
    line = sys.stdin.readline()
    if not line:
        return COMPLETE
    request = json.loads(line)
    device, dtype = torch.device(request["device"]), getattr(torch, request["dtype"])
    by_name = {shape.name: shape for shape in (*SHAPES, *REHEARSAL)}
    job = Job(request["kind"], by_name.get(request["shape"]), request["routing"])
    pen, clock = Pen(Journal(Path(request["journal"])), job.name), Clock(request["seconds"])
    if device.type == "cpu":
        # a rehearsal: its figures mean nothing, and other threads would only wait for each other
        torch.set_num_threads(1)
    uuid = (
        getattr(torch.cuda.get_device_properties(device), "uuid", None)
        if device.type == "cuda"
        else None
    )
    with (
        listening() as compiled,
        Clocks(f"GPU-{str(uuid).removeprefix('GPU-')}" if uuid else None) as clocks,
    ):
        try:
            complete = do(job, dtype, device, clock, pen, clocks, request)
        finally:
            if compiled.summary():
                pen.finish(
                    f"compiled in process {os.getpid()}",
                    compiled=[{"job": job.name, **compiled.summary()[0]}],
                )
    return COMPLETE if complete else INCOMPLETE


def _import_ahead() -> None:
    """What takes seconds and is needed later."""
    for module in ("triton", "transformers.models.mixtral.modeling_mixtral"):
        with suppress(ImportError):
            import_module(module)


def do(
    job: Job,
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    pen: Pen,
    clocks: Clocks,
    request: dict[str, Any],
) -> bool:
    """The job, in this process. True if it is complete."""
    on_gpu = device.type == "cuda"
    if job.kind == CASE:
        assert job.shape is not None
        case = Case(
            job.shape, job.routing, dtype, device, clock, pen, request["rounds"], request["without"]
        )
        return case.measure(clocks)
    if job.kind == BITS:
        assert job.shape is not None
        return check_bits(job.shape, dtype, device, clock.left, pen)
    if job.kind == ATTACK:
        return measure_attack(
            FULL_SIZE if on_gpu else REHEARSAL_SIZE, dtype, device, clock.left, pen
        )
    if job.kind == SANITIZER:
        return sanitize(dtype, clock.left, pen)
    shape = MAIN if on_gpu else REHEARSAL[0]
    if job.kind == BLOCKS:
        return compare_blocks(dtype, device, clock.left, pen, shape, request["rounds"])
    return tune(dtype, device, clock.left, pen, shape, request["rounds"])


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # everything is on disk, and what torch and Triton clear away at their end takes seconds
    os._exit(status)
