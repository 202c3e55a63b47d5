"""Rows of a batch that all ranks of a group have: each rank gets its part, and what becomes of the
parts is put together again on every rank.

Each rank computes the same loss of what all ranks have. So what comes back from a whole tensor is
the whole gradient on every rank. A rank needs its own rows of it, and the gradients of the parts
are put together. These two are each other's derivatives, to any order.

Shape suffixes: B rows of the batch, P ranks, R rows of a rank. R is the same on each rank, so the
last ranks may have rows beyond B.
"""

from typing import Any

import torch
from torch import Tensor

from ironmoe.moe.exchange.group import Group

WHAT = "the exchange of rows between ranks in step"


def own_rows(x: Tensor, group: Group, rows: int) -> Tensor:
    """x (B, …) → (R, …), the rows of this rank; 0 beyond B."""
    return _OwnRows.apply(x, group, rows)


def all_rows(x: Tensor, group: Group, total: int) -> Tensor:
    """x (R, …) of each rank → (B, …), the same bits on every rank."""
    return _AllRows.apply(x, group, total)


def of_first(x: Tensor, group: Group) -> Tensor:
    """The values of the first rank, where all ranks have computed the same but for rounding."""
    return _OfFirst.apply(x, group)


def same_gradient(x: Tensor, group: Group) -> Tensor:
    """The same values; their gradient is that of the first rank."""
    return _SameGradient.apply(x, group)


def fingerprint(x: Tensor) -> Tensor:
    """() int64, a number that depends on the bits of x (B, …) and on the order of its rows."""
    if not x.numel():
        return torch.zeros((), dtype=torch.int64, device=x.device)
    plain = x.detach()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    whole_numbers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = plain.contiguous().view(whole_numbers[plain.element_size()])
    sums_B = bits.reshape(len(x), -1).sum(1, dtype=torch.int64)
    places_B = torch.arange(1, len(x) + 1, device=x.device)
    return (sums_B * places_B).sum()


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, rows: int) -> Tensor:
        ctx.group, ctx.total = group, len(x)
        mine = x[group.rank * rows : (group.rank + 1) * rows]
        own = x.new_zeros(rows, *x.shape[1:])
        own[: len(mine)] = mine
        return own

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_rows(grad, ctx.group, ctx.total), None, None


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, total: int) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        return group.gather(x, WHAT)[:total]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return own_rows(grad, ctx.group, ctx.rows), None, None


class _OfFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        values = x.clone(memory_format=torch.contiguous_format)
        if values.numel():  # as bytes, since gloo does not have all dtypes
            group.broadcast(values.view(-1).view(torch.uint8), WHAT)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return same_gradient(grad, ctx.group), None


class _SameGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return of_first(grad, ctx.group), None
