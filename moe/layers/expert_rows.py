"""The expert in separate steps, where what lies between them must be touched or the rows are not T
· K."""

import torch
from torch import Tensor

from ironmoe.kernels import Dispatch, Routing, combine, grouped_matmul
from ironmoe.kernels.activations import get_activation
from ironmoe.kernels.route import autocast_dtype, without_autocast


def expert_rows(
    x_TD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Routing,
    dispatch: Dispatch,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: str = "gelu",
    precision: str = "ieee",
    dispatch_dtype: torch.dtype | None = None,
) -> Tensor:
    """What ``expert_mlp`` computes, rows made and summed outside the product. Slower, and it keeps
    more for the backward pass.

    Args:
        dispatch: any plan of R rows whose ``slot_row`` has the shape of the gates; R need not be T
            · K (Expert Choice).
        dispatch_dtype: round rows on their way to the experts, and what the experts give before it
            is weighed, to this dtype; the gradient passes the same roundings. The official V-MoE
            code does so in bfloat16 to save bandwidth between devices.
        The rest as ``expert_mlp``.
    """
    dtype = autocast_dtype(x_TD)
    if dtype is not None:
        x_TD, w_in, w_out = x_TD.to(dtype), w_in.to(dtype), w_out.to(dtype)
        b_in, b_out = (None if bias is None else bias.to(dtype) for bias in (b_in, b_out))
    with without_autocast(x_TD):
        rows_RD = _rounded(x_TD, dispatch_dtype)[dispatch.row_token]
        hidden_RF = grouped_matmul(rows_RD, w_in, dispatch.offsets, bias=b_in, precision=precision)
        activated_RF = get_activation(activation).value(hidden_RF)
        out_RD = grouped_matmul(
            activated_RF, w_out, dispatch.offsets, bias=b_out, precision=precision
        )
        return combine(_rounded(out_RD, dispatch_dtype), routing, dispatch)


def _rounded(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return values if dtype is None else values.to(dtype).to(values.dtype)
