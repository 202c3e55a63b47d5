"""One evaluation on several processes: each takes its share of the examples; only records
travel."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from ironmoe.attacks.engine.records import Records


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
    """This process's, if ``torch.distributed`` is initialised; else the whole."""
    if dist.is_available() and dist.is_initialized():
        return Shard(dist.get_rank(), dist.get_world_size())
    return Shard()
