"""The processes that share the experts of a layer."""

from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from ironmoe.moe.exchange.errors import members_of, naming_missing
from ironmoe.moe.exchange.traffic import count

_KNOWN: WeakKeyDictionary[Any, "Group"] = WeakKeyDictionary()


def every_rank() -> "Group":
    """All processes. The first call is an exchange of all of them."""
    process_group = dist.group.WORLD
    if process_group not in _KNOWN:
        _KNOWN[process_group] = Group(process_group)
    return _KNOWN[process_group]


class Group:
    """A process group as exchanges use it. Each of its processes must make one at the same time.

    rank: of this process in the group; size: how many processes there are; members: which.
    """

    def __init__(self, process_group: Any) -> None:
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        self.members = members_of(process_group)

    def global_rank(self, rank: int) -> int:
        """The rank among all processes of a rank of this group."""
        return self.members[rank].rank

    def start_rows(
        self, received: Tensor, rows: Tensor, receive: list[int], send: list[int], kind: str
    ) -> Any:
        """Begin to send ``send[r]`` rows to each rank r and to get ``receive[r]`` from it. Both
        matrices are contiguous. Returns what ``finish_rows`` waits for."""
        width = rows.shape[1] * rows.element_size()
        count(kind, [number * width for number in send], self.rank)
        with naming_missing(self.members, "the exchange of tokens between experts"):
            return dist.all_to_all_single(
                received, rows, receive, send, group=self.process_group, async_op=True
            )

    def finish_rows(self, work: Any) -> None:
        """Wait until the rows are there."""
        with naming_missing(self.members, "the exchange of tokens between experts"):
            work.wait()

    def sum(self, values: Tensor) -> None:
        """Replace the values by their sum over the group."""
        size = values.numel() * values.element_size()
        count("sums", [0, size], 0)
        with naming_missing(self.members, "a sum over ranks"):
            dist.all_reduce(values, group=self.process_group)

    def broadcast(self, values: Tensor) -> None:
        """Replace the values by those of the first rank."""
        with naming_missing(self.members, "the copy of weights to all ranks"):
            dist.broadcast(values, src=self.members[0].rank, group=self.process_group)

    def each(self, value: Any) -> list[Any]:
        """The values that the ranks give, in their order."""
        values: list[Any] = [None] * self.size
        with naming_missing(self.members, "a comparison of settings between ranks"):
            dist.all_gather_object(values, value, group=self.process_group)
        return values

    def __deepcopy__(self, _: Any) -> "Group":
        """A copy of a layer exchanges with the same processes."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a layer with expert parallelism belongs to the processes that made it and cannot be "
            "pickled: save its weights (ironmoe.moe.distributed.save_weights, or torch's DCP)"
        )
