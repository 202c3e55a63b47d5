"""Worlds: processes that know each other through gloo, several worlds in one program.

The program is one of its own, because a test process may have threads, which a fork does not
survive. It imports once; the processes of each world are forked from it.
"""

import itertools
import os
import sys
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist
from fork_server import run_forked

_NUMBERS = itertools.count(1)


def run_program(name, folder):
    """Run a file of tests/support in a folder; it may call ``world``."""
    run_forked(Path(__file__).with_name(f"{name}.py"), folder)


def world(size, *works, exits=None):
    """Call the works in each of so many processes, one after another. ``exits``: how each process
    must end, by default with 0."""
    number, children = next(_NUMBERS), []
    for rank in range(size):
        child = os.fork()
        if not child:
            work = partial(_in_world, rank, size, f"store{number}", works)
            os._exit(_code_of(work, f"rank {rank} of {size}"))
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if ends != (exits or [0] * size):
        sys.exit(f"the processes of world {number} ended with {ends}")


def torchrun(size, work):
    """Call ``work(rank)`` in so many processes, which find each other as torchrun lets them, and
    return their exit codes."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(size),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            os.environ["RANK"] = str(rank)
            os._exit(_code_of(partial(work, rank), f"rank {rank} of {size}"))
        children.append(child)
    del os.environ["WORLD_SIZE"]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def raised(kind, call):
    """What the error says that the call must raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} expected")


def _in_world(rank, size, store, works):
    if size > 1:
        method, timeout = f"file://{os.path.abspath(store)}", timedelta(seconds=60)
        dist.init_process_group(
            "gloo", init_method=method, rank=rank, world_size=size, timeout=timeout
        )
    for work in works:
        work()


def _code_of(work, name):
    try:
        work()
    except BaseException:
        print(name, file=sys.stderr)
        traceback.print_exc()
        return 1
    return 0
