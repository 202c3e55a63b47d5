"""Run one command on several processes, as ``torchrun`` or the command itself starts them."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import resource_tracker
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import typer
from torch.distributed.rendezvous import rendezvous

from ironmoe.bench.common.user_error import UserError
from ironmoe.moe.exchange.errors import is_of_exchange
from ironmoe.moe.parallel.together import naming_ranks

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # for slower processes; if one dies, torchrun ends the others
GRACE_SECONDS = 10.0
END_SECONDS = 3.0  # after these, what still works is ended by force
SAME_SECONDS = 3.0  # a process that fails waits so long for the first one to fail, too
OWN = "of one process"  # the note on an error that the other processes may not have
FAILED = "ironmoe/failed"  # where the process that fails first says why, for the others
GOES_ON = "What was finished is saved; the same command goes on from there"


class OtherProcessEnded(UserError):
    """Another process failed or was killed while this one waited for it."""


class Processes(NamedTuple):
    """This is process ``rank`` of ``world``."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T | None:
        """Let the first process do the work while the others wait. If it fails, all processes end,
        and the first says why.

        Returns:
            The result in the first process; None in the others.
        """
        made, error = None, None
        if self.is_first:
            try:
                made = work()
            except Exception as caught:
                error = caught
        if any(self.each(error is not None)):
            if error is None:
                give_way()
            raise error or typer.Exit(2)
        return made

    def largest(self, value: float) -> float:
        """The largest of the values that the processes give."""
        return max(self.each(value))

    def each(self, value: T) -> list[T]:
        """The values that the processes give, in the order of the processes."""
        values: list[T] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


def end_with_parent() -> None:
    """Wait for the process that started this one, and end with it: killed, it could not end its
    children, which would then go on beside those of the same command when it is given again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def watch_parent() -> None:
    """End with the process that started this one, whatever this one does meanwhile."""
    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started inside the block do not hear Ctrl-C, nor do those that they start.
    A terminal sends it to all of them, and each would print a traceback, most of all while it still
    imports. Whoever starts them ends them.

    This process hears it at the end of the block. POSIX only.
    """
    resource_tracker.ensure_running()  # when it starts, it lets SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Pool(ProcessPoolExecutor):
    """Fresh processes that end with this one. Ctrl-C and SIGTERM inside its block end them and
    what they have started, whatever they do."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, multiprocessing.get_context("spawn"), _begin_in_pool)
        self._others = multiprocessing.active_children()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        with deaf_to_interrupts():
            return super().submit(fn, *args, **kwargs)

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            for child in multiprocessing.active_children():
                if child not in self._others:
                    child.terminate()
        with deaf_to_interrupts():  # a second Ctrl-C would leave them
            super().__exit__(kind, *rest)


def _begin_in_pool() -> None:
    """SIGTERM ends a process with its own children, which would stay: as its own end does, or
    after a while by force."""
    watch_parent()

    def end(*_: object) -> None:
        timer = threading.Timer(END_SECONDS, _end_with_children)
        timer.daemon = True
        timer.start()
        sys.exit(1)

    signal.signal(signal.SIGTERM, end)


def _end_with_children() -> None:
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(1)


def number_started() -> int:
    """How many processes ``torchrun`` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first_process() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def give_way() -> None:
    """In every process but the first, wait before the process ends in an error, so that the first
    one can print it: torchrun ends all processes as soon as one ends."""
    if not is_first_process():
        time.sleep(GRACE_SECONDS)


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, where each process has one of its own; else ``device``."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise typer.BadParameter(
            f"torchrun --nproc-per-node must be at most the number of GPUs, {there}; or use "
            "--device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _mark_as_own(error: Exception) -> None:
    """Note on the error that the other processes may not have it."""
    if sys.version_info >= (3, 11):
        error.add_note(OWN)
    else:  # what add_note does
        error.__dict__.setdefault("__notes__", []).append(OWN)


def backend(device: torch.device) -> str:
    """Through which libraries tensors travel: those of a GPU through nccl, others through gloo."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Inside the block, this process is joined with the others through ``torch.distributed``.
    Without ``torchrun`` it is alone. A block inside another one joins nothing anew.

    If the block fails in one process, or a process is killed, the block fails in each of the others
    at its next exchange, at the latest when torchrun ends them.

    Raises:
        OtherProcessEnded: this process waited for one that ended; the message says which failed,
            and why.
    """
    if number_started() == 1:
        yield Processes()
        return
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return

    store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(
        backend(device), store=store, rank=rank, world_size=world, timeout=PATIENCE
    )
    # After an error this process stays in the group until it ends: to leave it would be to wait for
    # exchanges that the other processes may never join.
    with telling_failures(store, rank), naming_ranks():
        yield Processes(rank, world)
    dist.destroy_process_group()


@contextmanager
def telling_failures(store: Any, rank: int) -> Iterator[None]:
    """If the block fails in this process, the others learn why from the store that they share, as
    soon as an exchange with this one fails.

    Raises:
        OtherProcessEnded: this is one of these others.
    """
    try:
        yield
    except Exception as error:
        other = _other_end(error, store, rank)
        if other is not None:
            _mark_as_own(other)
            raise other from error
        if not _first_says_so(error, store, rank):
            _mark_as_own(error)
        raise


def _other_end(error: Exception, store: Any, rank: int) -> OtherProcessEnded | None:
    """What this error means if another process caused it. Else the others are told of it."""
    if isinstance(error, typer.Exit):
        return None
    if not is_of_exchange(error):
        what = _in_one_line(error)
        with suppress(RuntimeError):  # the process that keeps the store has ended
            store.set(f"{FAILED}/{rank}", what)
            store.compare_set(FAILED, "", f"process {rank} failed: {what}")
        return None

    said = getattr(error, "missing", "") or "another process ended"
    with suppress(RuntimeError):
        if store.check([FAILED]):
            said = store.get(FAILED).decode()
    return OtherProcessEnded(f"{said}. {GOES_ON}")


def _first_says_so(error: Exception, store: Any, rank: int) -> bool:
    """Whether this is another process than the first, which fails with the same error now."""
    if rank == 0:
        return False
    key, end = f"{FAILED}/0", time.monotonic() + SAME_SECONDS
    with suppress(RuntimeError):
        while time.monotonic() < end:
            if store.check([key]):
                return store.get(key).decode() == _in_one_line(error)
            time.sleep(0.1)
    return False


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
