"""Runs a program whose cases are worlds: groups of processes that know each other through gloo.

The program is one of its own, because a test process may have threads, which a fork does not
survive. It imports once; each world is forked from it.
"""

import subprocess
import sys

BEGIN = """
import os, signal, sys, traceback
from datetime import timedelta
import torch, torch.distributed as dist

torch.set_num_threads(1)
torch.set_flush_denormal(True)
{before}

def world(size, work, *arguments, exits=None):
    # Run work(rank, *arguments) in processes of their own; exits: how each must end, 0 by default
    world.number = getattr(world, "number", 0) + 1
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if size > 1:
                    store = "file://" + os.path.abspath(f"store{world.number}")
                    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size,
                                            timeout=timedelta(seconds=60))
                work(rank, *arguments)
                code = 0
            except BaseException:
                print(f"world {world.number} of {size}, rank {rank}, {work.__name__}",
                      file=sys.stderr)
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if ends != (exits or [0] * size):
        sys.exit(f"world {world.number}, {work.__name__}: the processes ended with {ends}")
"""


def run_worlds(program, folder, *arguments, before=""):
    """``program`` finds torch, dist, os, sys, signal and ``world``, and what ``before`` left, which
    imports modules. It fails where a process of a world does."""
    (folder / "program.py").write_text(BEGIN.replace("{before}", before) + program)
    done = subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
