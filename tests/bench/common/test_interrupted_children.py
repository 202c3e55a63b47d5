"""Ctrl-C reaches every process of a terminal: the children end without a word."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ironmoe.bench.common.processes import Pool

POOL = """
import multiprocessing, os, signal, sys, time
from ironmoe.bench.common.processes import Pool

def work(folder):
    context = multiprocessing.get_context("spawn")
    own = context.Process(target=time.sleep, args=(600,), daemon=True)
    own.start()
    with open(os.path.join(folder, "partial"), "w") as file:
        file.write(str(own.pid))
    os.replace(os.path.join(folder, "partial"), os.path.join(folder, "began"))
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of "&" has it ignored
    open(os.path.join(sys.argv[1], "starting"), "w").close()
    try:
        with Pool(1) as pool:
            pool.submit(work, sys.argv[1]).result()
    except KeyboardInterrupt:
        print("ended")
"""
STUDY = """
import signal
import sys
import ironmoe.bench.study.work.processes as processes
from ironmoe.bench.study.work.group import WorkGroup

class Options:
    processes = 2

class Study:
    options, folder = Options(), sys.argv[1]

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    open(sys.argv[1] + "/starting", "w").close()
    try:
        processes.work(Study(), WorkGroup(), print)
    except KeyboardInterrupt:
        print("ended")
"""


def interrupted(tmp_path, program, file, seconds):
    """What the program printed, which gets Ctrl-C with its children so long after the file came."""
    script = tmp_path / "program.py"
    script.write_text(program)
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            while not (tmp_path / file).exists() and process.poll() is None:
                time.sleep(0.02)
            time.sleep(seconds)
            os.killpg(process.pid, signal.SIGINT)
            return process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("file", "seconds"), [("starting", 0.3), ("began", 0.0)], ids=["while it imports", "at work"]
)
def test_children_of_a_pool_print_no_traceback(tmp_path, file, seconds):
    assert interrupted(tmp_path, POOL, file, seconds) == ("ended\n", "")
    if (tmp_path / "began").exists():
        with pytest.raises(ProcessLookupError):  # what the child had started has ended, too
            os.kill(int((tmp_path / "began").read_text()), 0)


def test_a_child_that_does_not_stop_by_itself_is_ended_by_force(tmp_path):
    stubborn = POOL.replace(
        "    time.sleep(600)\n",
        "    while True:\n        try:\n            time.sleep(600)\n"
        "        except SystemExit:\n            pass\n",
    )
    assert interrupted(tmp_path, stubborn, "began", 0.0) == ("ended\n", "")


def test_children_of_a_study_print_no_traceback_while_they_import(tmp_path):
    assert interrupted(tmp_path, STUDY, "starting", 0.4) == ("ended\n", "")


def test_children_of_a_pool_do_not_hear_ctrl_c_and_this_process_does():
    with Pool(1) as pool:
        assert signal.SIGINT in pool.submit(blocked).result()
    assert signal.SIGINT not in blocked()


def blocked():
    """The signals that this process does not hear."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])
