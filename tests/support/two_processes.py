"""Runs a program in two processes that know each other through gloo. It is a program of its own,
because a test process may have threads, which a fork does not survive."""

import subprocess
import sys

BEGIN = """
import os, sys, torch, torch.distributed as dist

torch.set_num_threads(1)
{before}
child = os.fork()  # so that modules are imported once
rank = 0 if child else 1
dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"),
                        rank=rank, world_size=2)
"""
END = """
if dist.is_initialized():
    dist.destroy_process_group()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(0)
"""


def run_in_two_processes(program, folder, *arguments, before=""):
    """``program`` finds torch, dist, os, sys, its ``rank`` and what the program ``before`` left,
    which runs once, ahead of the two processes, and imports modules for both. It fails where either
    process does."""
    (folder / "program.py").write_text(BEGIN.replace("{before}", before) + program + END)
    done = subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
