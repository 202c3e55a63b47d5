"""Workers of a study that are several processes: groups of processes which torchrun has started and
whose numbers follow each other. Each group has a torch.distributed of its own, so what its
processes share out they share out among themselves."""

import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import torch.distributed as dist
import typer
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ironmoe.bench.common.processes import (
    FAILED,
    PATIENCE,
    give_way,
    number_started,
    telling_failures,
)
from ironmoe.bench.models.expert_parallel import check_processes, run_on_kernels
from ironmoe.moe.distributed import ExchangeError, parallelize
from ironmoe.moe.exchange.alone import alone
from ironmoe.moe.exchange.group import every_rank
from ironmoe.moe.parallel.layers import expert_layers
from ironmoe.moe.parallel.together import naming_ranks
from ironmoe.moe.sharded import is_sharded

T = TypeVar("T")
LOOK_SECONDS = 0.2
BEGUN = "ironmoe/study/begun"
TOLD = "ironmoe/study/told"


class WorkGroup:
    """This is process ``rank`` of the ``size`` processes of a group, which is number ``number`` of
    ``groups``. Without torchrun it is one process by itself.

    The first process of a group decides what the group does and writes what was found. Groups know
    nothing of each other, but that the first process of all hears what each has finished.

    store: through which all processes leave each other messages.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, number: int = 0, groups: int = 1, store: Any = None
    ) -> None:
        self.rank = rank
        self.size = size
        self.number = number
        self.groups = groups
        self.store = store
        self._heard = 0

    @property
    def is_first(self) -> bool:
        """Of its group."""
        return self.rank == 0

    @property
    def is_first_of_all(self) -> bool:
        return self.is_first and self.number == 0

    def same(self, value: T, what: str) -> T:
        """What the first process of the group gives, on each of its processes. what: it is, for an
        error.

        Raises:
            ExchangeError: a process of the group has ended.
        """
        return value if self.size == 1 else every_rank().first(value, what)

    def first(self, work: Callable[[], T], what: str) -> T | None:
        """Let the first process work by itself while the others of its group wait. If it fails, the
        others end, too.

        Returns:
            The result in the first process; None in the others.
        """
        made, error = None, None
        if self.is_first:
            try:
                with alone():
                    made = work()
            except Exception as caught:
                error = caught
        if not self.same(error is None, what):
            if error is None:
                give_way()
            raise error or typer.Exit(2)
        return made

    def can_share(self, model: nn.Module) -> bool:
        """Whether the model has experts, as many in each layer as can be shared out evenly."""
        layers = expert_layers(model).values()
        even = all(layer.num_experts % self.size == 0 for layer in layers)
        return self.size > 1 and len(layers) > 0 and even

    def share(self, model: nn.Module) -> None:
        """Share its experts out over the processes of the group, unless they are already."""
        if not is_sharded(model):
            run_on_kernels(model)
            parallelize(model, self._mesh)

    def begin(self, *, is_work_left: bool) -> None:
        """Let the other processes begin, or end where nothing is left. Called by the first one."""
        if self.store is not None:
            self.store.set(BEGUN, str(int(is_work_left)))

    def begins(self) -> bool:
        """Wait until the first process of all lets this one begin. False if nothing is left."""
        while (begun := self._read(BEGUN)) is None:
            if self._read(FAILED) is not None:
                give_way()
                raise typer.Exit(2)
            time.sleep(LOOK_SECONDS)
        return bool(int(begun))

    def leave(self, message: Any) -> None:
        """Leave a message for the first process of all."""
        with _naming_first():
            number = self.store.add(TOLD, 1) - 1
            self.store.set(f"{TOLD}/{number}", pickle.dumps(message))

    def left(self) -> Iterator[Any]:
        """The messages that were not read yet."""
        while (message := self._read(f"{TOLD}/{self._heard}")) is not None:
            self._heard += 1
            yield pickle.loads(message)

    def _read(self, key: str) -> bytes | None:
        """The value of a key of the store; None if it has none."""
        with _naming_first():
            return self.store.get(key) if self.store.check([key]) else None

    @cached_property
    def _mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", (self.size,), mesh_dim_names=("ep",))


@contextmanager
def _naming_first() -> Iterator[None]:
    """ExchangeError: the process that keeps the store, torchrun or the first of all, has ended."""
    try:
        yield
    except RuntimeError as error:
        ended = "torchrun or process 0 ended"
        raise ExchangeError(f"a message between processes: {ended}. ({error})", ended) from error


@contextmanager
def work_group(size: int) -> Iterator[WorkGroup]:
    """Inside the block this process is one of a group of ``size`` processes that torchrun has
    started.

    Raises:
        UserError: ``size`` does not divide the number of processes.
        OtherProcessEnded: this process waited for one that ended; the message says which failed,
            and why.
    """
    check_processes(size)
    if number_started() == 1:
        yield WorkGroup()
        return

    store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    number, within = divmod(rank, size)
    with telling_failures(store, rank):
        if size > 1:
            dist.init_process_group(
                "gloo",
                store=PrefixStore(f"ironmoe/study/group{number}", store),
                rank=within,
                world_size=size,
                timeout=PATIENCE,
            )
        with naming_ranks():
            yield WorkGroup(within, size, number, world // size, store)
    if size > 1:
        dist.destroy_process_group()
