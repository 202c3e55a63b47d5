"""Functions in processes of this machine that know each other through gloo.

They are copies of one process without threads, so everything is imported once.
"""

import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ironmoe.bench.common.processes import watch_parent
from ironmoe.bench.common.user_error import UserError

PATIENCE = timedelta(seconds=60)  # for a process that does not come
LONGEST = 300  # seconds of all that is asked for

T = TypeVar("T")


def in_fresh_process(module: str, option: str, *arguments: str) -> Any:
    """What a module prints as JSON when it runs as a program with these arguments. A fresh process
    has no threads yet, so that copies can be made of it.

    Raises:
        UserError: it failed, or did not come to its end. ``option`` is what the user asked for.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{option} must end within {LONGEST} seconds, and did not") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
        raise UserError(f"{option}: a process failed: {lines[-1]}")
    return json.loads(done.stdout)


def on_each_rank(work: Callable[[int, int, Any], T], size: int) -> list[T]:
    """What ``work(rank, size, mesh)`` gives on each rank of a mesh of one dimension, "ep". The
    function must be one that another process can import."""
    for name in ("torch.distributed.tensor", "torch._dynamo"):  # which DTensor imports late
        import_module(name)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, context) as pool:
        store = str(Path(folder) / "store")
        ranks = [pool.submit(_joined, work, rank, size, store) for rank in range(size)]
        return [rank.result() for rank in ranks]


def _joined(work: Callable[[int, int, Any], T], rank: int, size: int, store: str) -> T:
    from torch.distributed.device_mesh import init_device_mesh

    watch_parent()  # Ctrl-C ends it, and this process may wait for another one
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=PATIENCE
    )
    try:
        return work(rank, size, init_device_mesh("cpu", (size,), mesh_dim_names=("ep",)))
    finally:
        dist.destroy_process_group()
