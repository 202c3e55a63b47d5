"""Every rank has all tokens and computes what its own experts give; the sum over ranks is the
layer. Nothing but the sum travels.

Each rank computes the same before and after the layer, and the same loss. So the gradient that
comes back from the sum is whole on each rank, and the gradients that leave the layer are summed.
Shape suffixes: T tokens, D their width, K choices of a token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ironmoe.kernels import Routing
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.exchange.sums import total

# tokens (T, D) and their routing to the experts of this rank → y (T, D)
Layer = Callable[[Tensor, Routing], Tensor]


def replicated(
    group: Group, x_TD: Tensor, routing: Routing, num_experts: int, layer: Layer
) -> Tensor:
    """y (T, D) of tokens x (T, D) that all ranks of the group have.

    Args:
        num_experts: E of the whole layer.
        layer: the experts of this rank, numbered from 0; the others are marked as dropped.
    """
    own = num_experts // group.size
    experts_TK = routing.experts - group.rank * own
    is_own_TK = (experts_TK >= 0) & (experts_TK < own) & (routing.experts < num_experts)
    gates_TK = _SumBackward.apply(routing.gates, group).masked_fill(~is_own_TK, 0)
    own_routing = Routing(gates_TK, experts_TK.masked_fill(~is_own_TK, own))
    y_TD = layer(_SumBackward.apply(x_TD, group), own_routing)
    return _SumForward.apply(y_TD, group)


class _SumForward(torch.autograd.Function):
    """The sum over ranks; its gradient is the same on each of them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return total(values, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _SumBackward.apply(grad, ctx.group), None


class _SumBackward(torch.autograd.Function):
    """The same values; their gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _SumForward.apply(grad, ctx.group), None
