"""Programs in processes of their own which do not import torch again.

A test process may have threads, which a fork does not survive. So a server that has none imports
what the programs need, once for each test process, and they are forked from it.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

PRELOADED = [
    "torch._dynamo",  # an optimizer imports it
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "einops._torch_specific",
    "ironmoe.moe.distributed",
    "ironmoe.attacks.training",
]
SECONDS = 300
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def run_forked(file, folder, *arguments):
    """Run a Python file in a folder. Its imports find what lies there and in tests/support."""
    process = _context.Process(target=_run, args=(file, folder, arguments, dict(os.environ)))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    said = (folder / "output.txt").read_text()
    assert process.exitcode == 0, f"code {process.exitcode}\n{said[-6000:]}"


def _run(file, folder, arguments, environment):
    os.setpgrp()  # those that it forks end with it
    multiprocessing.set_start_method(None, force=True)  # what they start is started as usual
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(file), *arguments]
    sys.path[:0] = [str(folder), str(Path(__file__).parent)]
    with open("output.txt", "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    runpy.run_path(str(file), run_name="__main__")
