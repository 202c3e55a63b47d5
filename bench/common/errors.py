"""What the user of a command sees when something goes wrong."""

import json
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from ironmoe.bench.common.user_error import UserError

GOES_ON = (
    "What was finished is saved; the same command goes on from there, and does again what was "
    "under way."
)
PROGRAMS = Path(__file__).parents[1]


@contextmanager
def clear_errors(console: Console, *, goes_on: bool = True) -> Iterator[None]:
    """Inside the block, errors end the command as a user expects.

    A user's mistake is one line and exit status 2. A full disk is exit status 1, Ctrl-C 130,
    SIGTERM 143; they say that nothing finished is lost. A reader that closes the pipe, such as
    head, ends the command without a word. A bug keeps its traceback. ``goes_on``: whether the same
    command goes on after such an end.
    """
    from ironmoe.attacks.data.errors import DataError
    from ironmoe.moe.checkpoints.errors import CheckpointError
    from ironmoe.moe.exchange.errors import RanksDisagreeError

    flush_denormals()
    then = f" {GOES_ON}" if goes_on else ""
    try:
        with _sigterm_raises():
            yield
    except (UserError, CheckpointError, DataError, RanksDisagreeError, typer.BadParameter) as error:
        _print_error(error, str(error))
        raise typer.Exit(2) from None
    except BrokenPipeError:
        raise  # click ends quietly
    except OSError as error:  # a disk that fills up in the middle
        _print_error(error, f"{_of_files(error)}.{then}")
        raise typer.Exit(1) from None
    except Terminated:
        console.print(f"Terminated.{then}")
        raise typer.Exit(128 + signal.SIGTERM) from None
    except KeyboardInterrupt:
        console.print(f"Interrupted.{then}")
        raise typer.Exit(130) from None


def flush_denormals() -> None:
    """Take denormal numbers for 0, in this process. The Adam moments of idle experts decay into
    them, and they are ten times as slow."""
    import torch

    torch.set_flush_denormal(True)
    # numpy notices, and is of no use here
    warnings.filterwarnings("ignore", "The value of the smallest subnormal", UserWarning)


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which a scheduler ends a job. What makes way for Ctrl-C makes way for it."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Inside the block SIGTERM raises Terminated in this process.

    Not in its children, nor where torchrun ends its processes by it: those may wait for each other.
    """
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_alone and is_main) or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    process = os.getpid()

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != process:  # a child that was forked inside the block
            os.kill(os.getpid(), signal.SIGTERM)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _of_files(error: OSError) -> str:
    """ "No space left on device: runs/x/report.json"."""
    if error.strerror is None:
        return f"{error}"
    if error.filename is None:  # files of the project are written under their names
        return f"standard output cannot be written: {error.strerror}"
    return f"{error.strerror}: {error.filename}"


def told(error: BaseException) -> str:
    """An error of foreign code in one line: what it is, and where it was raised."""
    *_, last = traceback.extract_tb(error.__traceback__)
    where = (
        f" ({Path(last.filename).name}, line {last.lineno})"
        if PROGRAMS not in Path(last.filename).parents
        else ""
    )
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _print_error(error: Exception, message: str) -> None:
    """Print the error. What all processes find wrong, only the first one prints: torchrun ends the
    others while they wait."""
    from ironmoe.bench.common.processes import OWN, give_way, is_first_process

    who = "ironmoe: "
    if not (is_first_process() or OWN in getattr(error, "__notes__", ())):
        give_way()
        who = f"ironmoe, process {os.environ['RANK']}: "  # the first one has not found it
    Console(stderr=True).print(Text.assemble((who, "bold red"), message), soft_wrap=True)
    _tell_torchrun(who + message)


def _tell_torchrun(message: str) -> None:
    """torchrun ends with a traceback of its own, and below it says what this file says."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        now = str(int(time.time()))
        what = {"message": {"message": message, "extraInfo": {"timestamp": now}}}
        with suppress(OSError):
            Path(file).write_text(json.dumps(what))
