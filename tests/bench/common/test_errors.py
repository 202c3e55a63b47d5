"""How a command ends: by a signal, on a full disk, into a closed pipe, on an ASCII terminal."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ironmoe.attacks.evaluation.journal_file import JournalFile
from ironmoe.bench.__main__ import main
from ironmoe.bench.common.errors import clear_errors
from ironmoe.bench.common.files import open_atomically
from ironmoe.bench.common.user_error import UserError

FULL = Path("/dev/full")  # writing to it says that no space is left


def ends(error, **options):
    """(exit status, what is printed to stdout) of a command in which this happens."""
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(typer.Exit) as end, clear_errors(console, **options):
        error()
    return end.value.exit_code, console.file.getvalue()


@pytest.fixture
def default_sigterm():
    """As in a fresh process: a program that another test ran may have left its own handler."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_is_said_like_ctrl_c_and_has_its_own_status(monkeypatch, default_sigterm):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    status, printed = ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert status == 143 and printed.startswith("Terminated. What was finished is saved; the same")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_torchrun_says_once_more_what_was_wrong(tmp_path, monkeypatch, capsys):
    """Below a traceback of its own: "Root Cause … traceback : ironmoe: …"."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def fail():
        raise UserError("--eps must be above 0, got -1")

    assert ends(fail)[0] == 2
    failed = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    said = ChildFailedError("ironmoe", {0: failed}).format_msg()
    assert "ironmoe: --eps must be above 0, got -1\n" in said and "To enable traceback" not in said
    assert capsys.readouterr().err == "ironmoe: --eps must be above 0, got -1\n"


FORKING = """
import os, signal
from rich.console import Console
from ironmoe.bench.common.errors import clear_errors

with clear_errors(Console(quiet=True)):
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
"""


def test_a_child_of_a_command_dies_by_sigterm_as_ever():
    alone = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = subprocess.run(
        [sys.executable, "-c", FORKING], env=alone, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_full_disk_names_the_file(tmp_path, monkeypatch, capsys):
    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write():
        with open_atomically(tmp_path / "report.json") as file:
            file.write(b"1")

    monkeypatch.setattr(os, "fsync", full)
    assert ends(write)[0] == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"No space left on device: {tmp_path}/report.json. What was finished is saved" in said
    assert not list(tmp_path.iterdir())


def test_a_command_that_keeps_nothing_does_not_say_that_it_goes_on(capsys):
    def write():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as print does

    for goes_on in (False, True):
        assert ends(write, goes_on=goes_on)[0] == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "standard output cannot be written: No space left on device." in said
        assert ("goes on from there" in said) is goes_on


@pytest.mark.skipif(not FULL.exists(), reason="Linux has a device that is always full")
def test_a_full_disk_names_the_journal():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        JournalFile(FULL).write({"a": 1})


def test_a_pipe_that_closes_ends_the_command_without_a_word(capsys):
    def closes():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError), clear_errors(Console(quiet=True)):
        closes()
    assert capsys.readouterr() == ("", "")


def test_letters_that_a_terminal_does_not_know_are_replaced(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["ironmoe", "attack", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    sys.stdout.flush()
    assert end.value.code == 0 and b"?" in raw.getvalue()
    print("2.5 · eps × ≤")  # still no error
