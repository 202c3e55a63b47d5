"""The part of a sharded weight that this rank holds, with its gradient."""

from typing import Any

import torch
from torch import Tensor


def local_part(weight: Tensor, divide_by: int) -> Tensor:
    """The numbers of a DTensor that this rank holds, as a plain tensor.

    Its gradient is that of all tokens of the group, since these came here. ``divide_by``: what the
    weight's gradient is divided by. (``DTensor.to_local`` has no second derivative.)
    """
    return _LocalPart.apply(weight, divide_by)


class _LocalPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, divide_by: int) -> Tensor:
        ctx.divide_by = divide_by
        ctx.mesh = weight.device_mesh
        ctx.placements = weight.placements
        ctx.sizes = weight.shape, weight.stride()
        local = weight.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from torch.distributed.tensor import DTensor

        shape, stride = ctx.sizes
        if ctx.divide_by != 1:
            grad = grad / ctx.divide_by
        whole = DTensor.from_local(
            grad, ctx.mesh, ctx.placements, run_check=False, shape=shape, stride=stride
        )
        return whole, None
