"""One evaluation on several processes: each takes its share of the examples; only records
travel."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from ironmoe.attacks.engine.records import Records
from ironmoe.moe.parallel.alone import is_alone
from ironmoe.moe.sharded import is_sharded


class Shard(NamedTuple):
    """Process ``rank`` of ``world``."""

    rank: int = 0
    world: int = 1

    def takes(self, indices: Tensor, unit: int) -> Tensor:
        """(n,) bool: the examples that are this process's, by their numbers; units stay whole."""
        return indices // unit % self.world == self.rank

    def share(self, total: int) -> int:
        """Of something to be divided exactly."""
        return total // self.world + (self.rank < total % self.world)

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every process, in the order of ranks, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def gather(self, records: Records) -> Records:
        """The records of all processes. Of an image that two know, from an earlier run with other
        shares, the later state."""
        parts = self.gather_objects(records)
        if len(parts) == 1:
            return records
        together = Records()
        for record in (record for part in parts for record in part):
            together.add(record)
        return together


def current_shard() -> Shard:
    """This process's, if it shares its work with others; else the whole."""
    return Shard() if is_alone() else Shard(dist.get_rank(), dist.get_world_size())


def check_whole(shard: Shard, *models: object) -> None:
    """ValueError: a model has its weights in several processes. Each process asks at its own pace,
    so passes in which all of them must take part would wait for ever."""
    if shard.world > 1 and any(isinstance(m, nn.Module) and is_sharded(m) for m in models):
        raise ValueError(
            "model must have all of its weights in each process, got weights that are sharded, as "
            "by FSDP2: load the full weights into a model that is not sharded"
        )
