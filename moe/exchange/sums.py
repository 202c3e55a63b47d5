"""Sums over ranks that have a gradient: what a loss over the tokens of all ranks is made of."""

from typing import Any

import torch
from torch import Tensor

from ironmoe.moe.exchange.eager import outside_graphs
from ironmoe.moe.exchange.group import Group


def total(values: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of a group, without a graph; floats in float32 or wider."""
    floats = values.is_floating_point()
    wide = torch.promote_types(values.dtype, torch.float32) if floats else values.dtype
    summed = values.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
    group.sum(summed)
    return summed.to(values.dtype)


def sum_over_ranks(values: Tensor, group: Group | None) -> Tensor:
    """The sum over the ranks of a group; the values themselves without a group. Each rank must call
    it, and must have values of the same shape.

    Every rank makes a loss of the whole sum, and all these losses count. So the gradient is the sum
    of those of all ranks: divided by their number, as data parallelism does it, it is that of one
    process which has all tokens. Derivatives of any order are right.
    """
    return values if group is None else _with_gradient(values, group)


@outside_graphs
def _with_gradient(values: Tensor, group: Group) -> Tensor:
    return _Sum.apply(values, group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return total(values, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return sum_over_ranks(grad, ctx.group), None
