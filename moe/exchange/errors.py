"""Errors of exchanges between processes, which name the rank that is missing."""

import os
import re
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

GRACE_SECONDS = 5.0  # survivors of a rank that has ended notice it within these
KEY = "ironmoe/ended"

_GLOO = re.compile(r"/gloo/[\w/]+\.(cc|h):\d+")  # where an error of gloo says that it arose
# the modules of torch that call what exchanges data
_EXCHANGES = ("torch.distributed.distributed_c10d", "torch.distributed._functional_collectives")


class ExchangeError(RuntimeError):
    """A rank did not take part in an exchange: it has ended, or does something else.

    missing: which rank, and what is known of it, in words.
    """

    def __init__(self, message: str, missing: str = "") -> None:
        super().__init__(message)
        self.missing = missing


class RanksDisagreeError(ValueError):
    """Ranks came to one exchange with tensors or options that do not belong together."""


class Member(NamedTuple):
    """A process of a group: its rank of all, and where it runs."""

    rank: int
    host: str
    pid: int

    def has_ended(self) -> bool | None:
        """Whether the process is gone; None where that cannot be seen from here."""
        if self.host != socket.gethostname():
            return None
        with suppress(OSError):
            # a process that was killed stays a zombie until its parent asks for it
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state in "ZX"
        with suppress(PermissionError):
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return True
        return False


def members_of(group: Any) -> list[Member]:
    """All processes of a group, in the order of its ranks. Each of them must call it."""
    own = Member(dist.get_rank(), socket.gethostname(), os.getpid())
    members: list[Any] = [None] * dist.get_world_size(group)
    unknown = [Member(rank, "", 0) for rank in dist.get_process_group_ranks(group)]
    with naming_missing(unknown, "the first exchange between ranks"):
        dist.all_gather_object(members, own, group=group)
    return members


@contextmanager
def naming_missing(members: Sequence[Member], what: str) -> Iterator[None]:
    """Replace the error of an exchange inside the block by one that says which rank did not take
    part.

    Args:
        members: the processes that take part.
        what: is exchanged, for the message.

    Raises:
        ExchangeError: torch's exchange failed or took longer than the timeout of its group.
    """
    try:
        yield
    except ExchangeError:
        raise
    except (RuntimeError, dist.DistBackendError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        missing = missing_among(members)
        raise ExchangeError(f"{what} failed: {missing}. ({error})", missing) from error


@contextmanager
def naming_missing_at(members: Sequence[Member], what: str) -> Iterator[None]:
    """``naming_missing`` for a block that does other work, too: errors of that stay as they are."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_exchange(error):
            raise
        with naming_missing(members, what):
            raise


def is_of_exchange(error: BaseException) -> bool:
    """Whether it was raised while processes exchanged something. gloo has no class for its errors;
    they name the file of gloo."""
    if isinstance(error, ExchangeError | dist.DistError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    modules = [frame.f_globals.get("__name__", "") for frame in frames]
    callers = [name for name in modules if name != "torch._ops"]  # operators are called by it
    return callers[-1:] in ([name] for name in _EXCHANGES) or bool(_GLOO.search(str(error)))


def missing_among(members: Sequence[Member]) -> str:
    """Which of the processes have ended, or did not fail as this one did: in words. Each process
    whose exchange failed must call it; it waits up to ``GRACE_SECONDS`` for the others."""
    store = _store()
    here = next((m for m in members if m.rank == dist.get_rank()), None)
    silent = [member for member in members if member is not here]
    with suppress(RuntimeError):  # the process that keeps the store may be the one that ended
        if store is not None and here is not None:
            store.set(f"{KEY}/{here.rank}", "1")

    end = time.monotonic() + GRACE_SECONDS
    while True:
        gone = [member for member in silent if member.has_ended()]
        silent = [member for member in silent if not _has_said_so(store, member)]
        if gone or not silent or time.monotonic() > end:
            break
        time.sleep(0.05)

    if gone:
        return f"{_named(gone)} ended"
    if silent:
        return (
            f"{_named(silent)} did not take part: it ended, failed, or has made another number "
            "of passes"
        )
    return "every rank failed in it"


def _has_said_so(store: Any, member: Member) -> bool:
    try:
        return store is not None and store.check([f"{KEY}/{member.rank}"])
    except RuntimeError:
        return False


def _store() -> Any:
    """The store that all processes share; None where there is none any more."""
    with suppress(ValueError, RuntimeError):
        return dist.distributed_c10d._get_default_store()
    return None


def _named(members: Sequence[Member]) -> str:
    return " and ".join(
        f"rank {member.rank}" + f" (process {member.pid} on {member.host})" * bool(member.host)
        for member in members
    )
