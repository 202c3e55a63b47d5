"""What the user of a command sees when something goes wrong."""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from ironmoe.bench.common.user_error import UserError

PROGRAMS = Path(__file__).parents[1]


@contextmanager
def clear_errors(console: Console) -> Iterator[None]:
    """Inside the block, errors end the command as a user expects.

    A user's mistake is one line and exit status 2. A full disk is exit status 1, Ctrl-C 130; both
    say that nothing finished is lost. A bug keeps its traceback.
    """
    import torch

    from ironmoe.attacks.data.errors import DataError
    from ironmoe.moe.checkpoints.errors import CheckpointError

    # idle experts' Adam moments decay into denormals, which are ten times as slow
    torch.set_flush_denormal(True)
    # numpy notices
    warnings.filterwarnings("ignore", "The value of the smallest subnormal", UserWarning)
    try:
        yield
    except (UserError, CheckpointError, DataError, typer.BadParameter) as error:
        _print_error(error, str(error))
        raise typer.Exit(2) from None
    except OSError as error:  # a disk that fills up in the middle
        _print_error(
            error, f"{error}. What was finished is saved; the same command goes on from there."
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print(
            "Interrupted. What was finished is saved; the same command goes on from there."
        )
        raise typer.Exit(130) from None


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
    """Print the error. What all processes find wrong, only the first one prints."""
    from ironmoe.bench.common.processes import OWN, give_way, is_first_process

    if is_first_process() or OWN in getattr(error, "__notes__", ()):
        Console(stderr=True).print(
            Text.assemble(("ironmoe: ", "bold red"), message), soft_wrap=True
        )
    else:
        give_way()
