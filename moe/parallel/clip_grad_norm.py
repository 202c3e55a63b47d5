"""The norm of gradients that are shared out over several meshes, and its bound."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ironmoe.moe.exchange.alone import is_alone
from ironmoe.moe.exchange.errors import naming_missing
from ironmoe.moe.exchange.group import every_rank
from ironmoe.moe.sharded import local_values


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for parameters on different meshes, which that one
    refuses: experts on some ranks, other weights on others or on all. The norm is that of one
    process: what several ranks have copies of counts once.

    Every rank must call it, after the gradients are averaged. Sums are in float64.

    Args:
        parameters: a module, or parameters.
        max_norm: gradients are scaled so that their norm is at most this.
        norm_type: p ≥ 1 of the norm; may be infinity.
        error_if_nonfinite: raise a RuntimeError if the norm is no finite number.

    Returns:
        () float64, the norm before; the same on every rank.
    """
    if not norm_type >= 1:
        raise ValueError(f"norm_type must be at least 1, got {norm_type}")
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    grads = [p.grad for p in given if p.grad is not None]
    members = [] if is_alone() else every_rank().members
    if not grads:
        return torch.zeros((), dtype=torch.float64)

    norms = _norms(grads, norm_type)
    op = dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM
    with naming_missing(members, "the norm of gradients"):
        for groups, value in norms.items():
            for group in groups:
                dist.all_reduce(value, op=op, group=group)
    total = _together(torch.stack(list(norms.values())), norm_type)
    if norm_type != math.inf:
        total = total ** (1 / norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the norm of the gradients must be finite, got {float(total)}")
    factor = (max_norm / (total + 1e-6)).clamp(max=1)  # as torch has it
    for grad in map(local_values, grads):
        grad.mul_(factor.to(grad.device, grad.dtype))
    return total


def _norms(grads: list[Tensor], p: float) -> dict[tuple[Any, ...], Tensor]:
    """For the ranks over which gradients are shared out: Σ |g|ᵖ of what this rank holds of these
    gradients, or the largest |g|. Dictionaries keep the order of the parameters, which all ranks
    have alike."""
    device = local_values(grads[0]).device
    powers: dict[tuple[Any, ...], list[Tensor]] = {}
    for grad in grads:
        local = local_values(grad)
        if not local.numel():  # the largest of no numbers is none
            local = local.new_zeros(1)
        norm = torch.linalg.vector_norm(local, p, dtype=torch.float64).to(device)
        powers.setdefault(_shared_out_over(grad), []).append(norm if p == math.inf else norm**p)
    return {over: _together(torch.stack(each), p) for over, each in powers.items()}


def _together(values: Tensor, p: float) -> Tensor:
    return values.max() if p == math.inf else values.sum()


def _shared_out_over(grad: Any) -> tuple[Any, ...]:
    """The process groups over which the numbers of a gradient are shared out; () of one that every
    rank has whole."""
    if not hasattr(grad, "placements"):
        return ()
    mesh = grad.device_mesh
    return tuple(
        mesh.get_group(dimension)
        for dimension, placement in enumerate(grad.placements)
        if not placement.is_replicate()
    )
