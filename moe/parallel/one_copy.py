"""Which ranks have one copy of a model's weights together."""

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn

from ironmoe.moe.exchange.group import Group, every_rank, known_group, timeout_of_all
from ironmoe.moe.sharded import give_back_gathered, is_sharded

# all processes → (ranks of a group, the group)
_MADE: WeakKeyDictionary[Any, dict[tuple[int, ...], Group]] = WeakKeyDictionary()


def group_of_one_copy(models: Iterable[nn.Module]) -> Group | None:
    """The ranks over which the weights of these models are shared out, this one among them; None
    where this process has all weights. Each of these ranks must call it."""
    each = dict(_ranks_of_weights(models))
    together = _together(each)
    if len(together) <= 1:
        return None
    if len(together) == dist.get_world_size():
        return every_rank()
    if each.get(together) is not None:
        return known_group(each[together])
    made = _MADE.setdefault(dist.group.WORLD, {})
    if together not in made:
        group = dist.new_group(
            list(together), timeout=timeout_of_all(), use_local_synchronization=True
        )
        made[together] = known_group(group)
    return made[together]


def are_on_several_ranks(models: Iterable[nn.Module]) -> bool:
    """Whether another rank has a part of these weights. Nothing is exchanged."""
    return len(_together(dict(_ranks_of_weights(models)))) > 1


def _together(each: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted({rank for ranks in each for rank in ranks}))


def _ranks_of_weights(models: Iterable[nn.Module]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """For each weight that is a DTensor, the ranks over which its numbers are shared out, and their
    process group where they are one dimension of a mesh."""
    for model in models:
        if not is_sharded(model):
            continue
        give_back_gathered(model)
        weights: Iterable[Any] = model.parameters()
        for weight in weights:
            if hasattr(weight, "device_mesh"):
                mesh = weight.device_mesh
                over = [d for d, each in enumerate(weight.placements) if not each.is_replicate()]
                yield _ranks(mesh, over), mesh.get_group(over[0]) if len(over) == 1 else None


def _ranks(mesh: Any, dimensions: list[int]) -> tuple[int, ...]:
    """The ranks that differ from this one in these dimensions of the mesh alone, in ascending
    order."""
    here = mesh.get_coordinate()
    where = tuple(slice(None) if d in dimensions else at for d, at in enumerate(here))
    return tuple(sorted(mesh.mesh[where].flatten().tolist()))
