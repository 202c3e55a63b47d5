"""Gradients that are equal on all ranks that have copies of a weight."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ironmoe.moe.exchange.errors import naming_missing
from ironmoe.moe.exchange.group import every_rank
from ironmoe.moe.layers.ranks import GRADIENTS
from ironmoe.moe.parallel.buckets import buckets
from ironmoe.moe.parallel.layers import expert_parallels
from ironmoe.moe.parallel.parallelize import TOLD, dimensions
from ironmoe.moe.sharded import local_values


@torch.no_grad()
def average_gradients(model: nn.Module, mesh: Any, *, gradients: str | None = None) -> None:
    """Make the gradients those of all ranks, where FSDP2 does not: call it after ``backward()``,
    once a step, on every rank. Weights that FSDP2 shards are left alone, because it has done so;
    those beside them, such as of a head that was added afterwards, are not.

    A weight that has a gradient on some ranks only counts as 0 on the others.

    Args:
        model: what ``parallelize`` returned, also inside another module, or a model whose layers
            were shared out one by one.
        mesh: the whole mesh.
        gradients: "mean" over ranks, or "sum"; by default what ``parallelize`` was told.

    Raises:
        TypeError, ValueError: as for ``parallelize``; or ``gradients`` are not those that the
            experts have.
    """
    names = dimensions(mesh)
    gradients = _agreed_gradients(model, gradients)
    experts = [p for p in model.parameters() if hasattr(p, "device_mesh")]
    others = [p for p in model.parameters() if not hasattr(p, "device_mesh")]
    if "fsdp" in names:
        experts = []

    with naming_missing(every_rank().members, "the average of gradients"):
        _average(others, experts, mesh, names, gradients == "mean")


def _agreed_gradients(model: nn.Module, given: str | None) -> str:
    """What the gradients of the experts are already, and those of the others shall be."""
    if given is not None and given not in GRADIENTS:
        raise ValueError(f"gradients must be one of {GRADIENTS}, got {given!r}")

    told = {vars(module)[TOLD] for module in model.modules() if TOLD in vars(module)}
    told |= {state.gradients for state in expert_parallels(model)}
    if len(told) > 1:
        raise ValueError(
            "model must have layers that were parallelized with one value of gradients, got "
            f"{sorted(told)}"
        )
    if given is not None and told - {given}:
        raise ValueError(
            f"gradients must be {told.pop()!r}, as parallelize was told, got {given!r}"
        )
    return given or next(iter(told), GRADIENTS[0])


def _average(
    others: list[nn.Parameter],
    experts: list[nn.Parameter],
    mesh: Any,
    names: tuple[str, ...],
    is_mean: bool,
) -> None:
    everywhere = [mesh.get_group(name) for name in range(mesh.ndim)]
    _reduce(others, everywhere, mesh.size() if is_mean else 1)
    copies = [mesh.get_group(d) for d, name in enumerate(names) if name != "ep"]
    ranks = mesh.size() // (mesh.size(names.index("ep")) if "ep" in names else 1)
    _reduce(experts, copies, ranks if is_mean else 1)


def _reduce(weights: list[nn.Parameter], groups: list[Any], divide_by: int) -> None:
    """Sum over the groups, one after another, and divide."""
    if not weights or not groups:
        return
    has = torch.tensor([w.grad is not None for w in weights], dtype=torch.int32)
    has = has.to(weights[0].device)
    for group in groups:
        dist.all_reduce(has, op=dist.ReduceOp.MAX, group=group)
    chosen = [w for w, there in zip(weights, has.tolist(), strict=True) if there]
    for weight in chosen:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    own = (local_values(weight.grad) for weight in chosen if weight.grad is not None)
    for bucket in buckets(own):
        _reduce_bucket(bucket, groups, divide_by)


def _reduce_bucket(bucket: list[Tensor], groups: list[Any], divide_by: int) -> None:
    """Several gradients travel as one tensor for each dtype."""
    # in the order of the weights, which all ranks have alike; that of a set differs
    for dtype in dict.fromkeys(grad.dtype for grad in bucket):
        same = [grad for grad in bucket if grad.dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        flat = torch.cat([grad.flatten().to(wide) for grad in same])
        for group in groups:
            dist.all_reduce(flat, group=group)
        flat /= divide_by
        for grad, values in zip(same, flat.split([g.numel() for g in same]), strict=True):
            grad.copy_(values.view_as(grad))
