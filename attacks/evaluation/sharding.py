"""One evaluation on several processes: each takes its share of the examples; only records
travel.

Where the weights of a model are shared out over processes, those that have one copy of it together
are one replica. They do the same with the same examples; the first of them tells what was found,
and decides what must be the same although it is not the model that says it."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from ironmoe.attacks.engine.records import Records
from ironmoe.moe.exchange.alone import is_alone
from ironmoe.moe.exchange.errors import RanksDisagreeError
from ironmoe.moe.exchange.group import Group, every_rank
from ironmoe.moe.parallel.lock_step import group_in_step
from ironmoe.moe.sharded import is_sharded

T = TypeVar("T")
WHAT = "what processes found"


class Shard(NamedTuple):
    """Replica ``rank`` of ``world``: a process, or all processes of a group.

    group: the processes that have the weights together; None: this one has all of them
    firsts: of each replica, the rank of its first process among all; () where each is a process
    """

    rank: int = 0
    world: int = 1
    group: Group | None = None
    firsts: tuple[int, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.group is None or self.group.rank == 0

    def takes(self, indices: Tensor, unit: int) -> Tensor:
        """(n,) bool: the examples that are this replica's, by their numbers; units stay whole."""
        return indices // unit % self.world == self.rank

    def share(self, total: int) -> int:
        """Of something to be divided exactly."""
        return total // self.world + (self.rank < total % self.world)

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every replica, in the order of ranks, on every process."""
        if self.group is not None:
            each = every_rank().each(value if self.is_first else None, WHAT)
            return [each[first] for first in self.firsts]
        if self.world == 1:
            return [value]
        return every_rank().each(value, WHAT)

    def gather(self, records: Records) -> Records:
        """The records of all processes. Of an image that two know, from an earlier run with other
        shares, the later state."""
        parts = self.gather_objects(records)
        if len(parts) == 1:
            return parts[0]
        together = Records()
        for record in (record for part in parts for record in part):
            together.add(record)
        return together

    def agreed(self, value: T) -> T:
        """What the first process of this replica says, such as whether there is time left."""
        return value if self.group is None else self.group.first(value, "a decision")

    def first(self, work: Callable[[], T]) -> T:
        """Let the first process of this replica do the work; each has its result, or its error."""
        if self.group is None:
            return work()
        done: tuple[Any, Exception | None] = (None, None)
        if self.is_first:
            try:
                done = work(), None
            except Exception as error:
                done = None, error
        result, failed = self.agreed(done)
        if failed is not None:
            raise failed
        return result

    def check_same(self, arguments: dict[str, Any]) -> None:
        """RanksDisagreeError: the processes of this replica come with other arguments, by name."""
        if self.group is None:
            return
        for rank, other in enumerate(self.group.each(arguments)):
            for name, value in arguments.items():
                if other[name] != value:
                    raise RanksDisagreeError(
                        f"{name} must be the same on all processes that share the weights of a "
                        f"model, got {value} on rank {self.group.global_rank(self.group.rank)} and "
                        f"{other[name]} on rank {self.group.global_rank(rank)}"
                    )


def current_shard(*models: Any) -> Shard:
    """This process's, if it shares its work with others; else the whole. With models whose weights
    are shared out, that of its replica: every process must call it."""
    if is_alone():
        return Shard()
    group = group_in_step(*models)
    if group is None:
        return Shard(dist.get_rank(), dist.get_world_size())
    firsts = tuple(sorted(set(every_rank().each(group.global_rank(0)))))
    return Shard(firsts.index(group.global_rank(0)), len(firsts), group, firsts)


def check_whole(shard: Shard, *models: object) -> None:
    """ValueError: a model has its weights in several processes, and each of these takes other
    examples. Passes in which all of them must take part would wait for ever."""
    takes_others = shard.world > 1 and shard.group is None
    if takes_others and any(isinstance(m, nn.Module) and is_sharded(m) for m in models):
        raise ValueError(
            "model must have all of its weights in each process, got weights that are sharded, as "
            "by FSDP2 or expert parallelism: call this in a block 'with in_step(model):' "
            "(ironmoe.moe.distributed) on each process, or load the full weights into a model that "
            "is not sharded"
        )
