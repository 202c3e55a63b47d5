"""The processes that share the experts of a layer."""

from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ironmoe.moe.exchange.errors import Member, members_of, naming_missing
from ironmoe.moe.exchange.traffic import count

T = TypeVar("T")

# not the groups themselves, which hold their key and would keep it alive for ever
_MEMBERS: WeakKeyDictionary[Any, list[Member]] = WeakKeyDictionary()
_MODELS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # how many are shared out


def every_rank() -> "Group":
    """All processes. The first call is an exchange of all of them."""
    return known_group(dist.group.WORLD)


def known_group(process_group: Any) -> "Group":
    """The ranks of a process group. The first call is an exchange of all of them."""
    group = Group(process_group, _MEMBERS.get(process_group))
    _MEMBERS[process_group] = group.members
    return group


class Group:
    """A process group as exchanges use it. Each of its processes must make one at the same time,
    unless its members are given.

    rank: of this process in the group; size: how many processes there are; members: which.
    """

    def __init__(self, process_group: Any, members: list[Member] | None = None) -> None:
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        wait_as_long_as_all(process_group)
        self.members = members or members_of(process_group)

    def global_rank(self, rank: int) -> int:
        """The rank among all processes of a rank of this group."""
        return self.members[rank].rank

    def next_model(self) -> int:
        """A number for a model that is shared out over this group: how many were before. Each of
        its ranks calls it for the same models, in the same order."""
        number = _MODELS.get(self.process_group, 0)
        _MODELS[self.process_group] = number + 1
        return number

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

    def broadcast(self, values: Tensor, what: str = "the copy of weights to all ranks") -> None:
        """Replace the values by those of the first rank. what: they are, for an error."""
        with naming_missing(self.members, what):
            dist.broadcast(values, src=self.members[0].rank, group=self.process_group)

    def gather(self, values: Tensor, what: str) -> Tensor:
        """The values (R, …) of all ranks one below another, (P · R, …). what: they are, for an
        error. Each rank gives as many."""
        values = values.contiguous()
        every = values.new_empty(self.size * len(values), *values.shape[1:])
        if values.numel():
            size = values.numel() * values.element_size()
            count("in_step", [size] * self.size, self.rank)
            # as bytes, since gloo does not have all dtypes
            given, taken = (part.view(-1).view(torch.uint8) for part in (values, every))
            with naming_missing(self.members, what):
                parts = list(taken.chunk(self.size))
                dist.all_gather(parts, given, group=self.process_group)
        return every

    def each(self, value: Any, what: str = "a comparison of settings between ranks") -> list[Any]:
        """The values that the ranks give, in their order."""
        values: list[Any] = [None] * self.size
        with naming_missing(self.members, what):
            dist.all_gather_object(values, value, group=self.process_group)
        return values

    def first(self, value: T, what: str) -> T:
        """The value that the first rank gives; any object that can be pickled."""
        values = [value]
        with naming_missing(self.members, what):
            dist.broadcast_object_list(values, src=self.members[0].rank, group=self.process_group)
        return values[0]

    def __deepcopy__(self, _: Any) -> "Group":
        """A copy of a layer exchanges with the same processes."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a layer with expert parallelism belongs to the processes that made it and cannot be "
            "pickled: save its weights (ironmoe.moe.distributed.save_weights, or torch's DCP)"
        )


def timeout_of_all() -> timedelta | None:
    """The timeout that ``init_process_group`` was given; None where its backend does not tell."""
    return timeout_of(dist.group.WORLD)


def wait_as_long_as_all(process_group: Any) -> None:
    """Give a process group for which nobody has chosen a timeout that of ``init_process_group``.
    torch gives the groups of a ``DeviceMesh`` its default, which is half an hour for gloo."""
    c10d: Any = dist.distributed_c10d
    told, own = timeout_of_all(), timeout_of(process_group)
    was_chosen = own not in (c10d.default_pg_timeout, c10d.default_pg_nccl_timeout)
    if told not in (None, own) and not was_chosen and hasattr(c10d, "_set_pg_timeout"):
        c10d._set_pg_timeout(told, process_group)


def timeout_of(process_group: Any) -> timedelta | None:
    """That of a process group; None where its backend does not tell. All backends of a group are
    given the same."""
    device = process_group._device_types[0]
    options = getattr(process_group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)
