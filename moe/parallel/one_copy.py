"""Which ranks have one copy of a model's weights together."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn

from ironmoe.moe.exchange.group import Group, every_rank, known_group
from ironmoe.moe.sharded import give_back_gathered, is_sharded

# all processes → (ranks of a group, the group)
_MADE: WeakKeyDictionary[Any, dict[tuple[int, ...], Group]] = WeakKeyDictionary()


def ranks_of_one_copy(models: Iterable[nn.Module]) -> Group | None:
    """The ranks over which the weights of these models are shared out, this one among them; None
    where this process has all weights. Each of these ranks must call it."""
    sharded = [model for model in models if is_sharded(model)]
    if not sharded or not dist.is_initialized():
        return None

    ranks: set[int] = set()
    one_dimension: dict[tuple[int, ...], Any] = {}
    for model in sharded:
        give_back_gathered(model)
        for parameter in model.parameters():
            if hasattr(parameter, "device_mesh"):
                mesh, dimensions = _shared_out_over(parameter)
                members = _ranks(mesh, dimensions)
                ranks |= set(members)
                if len(dimensions) == 1:
                    one_dimension[members] = mesh.get_group(dimensions[0])

    together = tuple(sorted(ranks))
    if len(together) <= 1:
        return None
    if len(together) == dist.get_world_size():
        return every_rank()
    if together in one_dimension:
        return known_group(one_dimension[together])
    made = _MADE.setdefault(dist.group.WORLD, {})
    if together not in made:
        group = dist.new_group(list(together), use_local_synchronization=True)
        made[together] = known_group(group)
    return made[together]


def _shared_out_over(parameter: Any) -> tuple[Any, list[int]]:
    """The mesh of a DTensor, and the dimensions over which its numbers are shared out."""
    placements = enumerate(parameter.placements)
    return parameter.device_mesh, [d for d, each in placements if not each.is_replicate()]


def _ranks(mesh: Any, dimensions: list[int]) -> tuple[int, ...]:
    """The ranks that differ from this one in these dimensions of the mesh alone, in ascending
    order."""
    here = mesh.get_coordinate()
    where = tuple(slice(None) if d in dimensions else at for d, at in enumerate(here))
    return tuple(sorted(mesh.mesh[where].flatten().tolist()))
