"""Runs a program in several processes that know each other through gloo. It is a program of its
own, because a test process may have threads, which a fork does not survive."""

from functools import partial

from fork_server import run_forked

BEGIN = """
import os, sys, torch, torch.distributed as dist

torch.set_num_threads(1)
{before}
rank, children = 0, []
for number in range(1, {processes}):
    child = os.fork()  # so that modules are imported once
    if not child:
        rank, children = number, []
        break
    children.append(child)
dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"),
                        rank=rank, world_size={processes})
"""
END = """
if dist.is_initialized():
    dist.destroy_process_group()
if rank:
    os._exit(0)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(next((code for code in codes if code), 0))
"""


def run_in_processes(number, program, folder, *arguments, before=""):
    """``program`` finds torch, dist, os, sys, its ``rank`` and what the program ``before`` left,
    which runs once, ahead of the processes, and imports modules for all of them; they find those of
    tests/support. It fails where one of the processes does."""
    begin = BEGIN.replace("{before}", before).replace("{processes}", str(number))
    (folder / "program.py").write_text(begin + program + END)
    run_forked(folder / "program.py", folder, *arguments)


run_in_two_processes = partial(run_in_processes, 2)
