"""The expert in separate steps: for callers that change what lies between the steps, or whose rows
are not T · K.

Shape suffixes: T tokens, R rows, D their width, F hidden units.
"""

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
    """Computes the same as ``expert_mlp``, but makes and sums the rows outside the products. It is
    slower and keeps more for the backward pass.

    Args:
        dispatch: any plan of R rows whose ``slot_row`` has the shape of the gates. R need not be
            T · K: under Expert Choice it is not.
        dispatch_dtype: round rows on their way to the experts, and what the experts give before it
            is weighed, to this dtype; the gradient passes the same roundings. The official V-MoE
            code does so in bfloat16 to save bandwidth between devices.
        The rest as ``expert_mlp``.
    """
    dtype = autocast_dtype(x_TD)
    if dtype is not None:
        x_TD = x_TD.to(dtype)
        w_in = w_in.to(dtype)
        w_out = w_out.to(dtype)
        b_in, b_out = (None if bias is None else bias.to(dtype) for bias in (b_in, b_out))
    with without_autocast(x_TD):
        # the second rounding changes no row, and rounds the gradient of each
        rows_RD = _rounded(
            _rounded(x_TD, dispatch_dtype)[dispatch.row_token.long()], dispatch_dtype
        )
        hidden_RF = grouped_matmul(rows_RD, w_in, dispatch.offsets, bias=b_in, precision=precision)
        activated_RF = get_activation(activation).value(hidden_RF)
        out_RD = grouped_matmul(
            activated_RF, w_out, dispatch.offsets, bias=b_out, precision=precision
        )
        return combine(_rounded(out_RD, dispatch_dtype), routing, dispatch)


def _rounded(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return values if dtype is None else values.to(dtype).to(values.dtype)
