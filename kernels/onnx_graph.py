"""What the operators become while ``torch.onnx.export`` runs: operations that ONNX has.

An ONNX graph knows neither Triton nor this library, so it gets plain torch operations, in an order
of its own: the rows of an expert are found by their numbers, and how many there are may change from
run to run.

Shape suffixes: R rows, D columns of x, N outputs of an expert; r the rows of one expert.
"""

import torch
from torch import Tensor

from ironmoe.kernels.route import onnx_exporting


def stable_sort(values: Tensor, dim: int, *, descending: bool = False) -> tuple[Tensor, Tensor]:
    """(values, indices) sorted along ``dim``; equal values stay in their order.

    ONNX sorts by TopK alone, which promises this order; the exporter takes the sort of torch that
    does not.
    """
    if onnx_exporting():
        values, indices = values.sort(dim=dim, descending=descending)
    else:
        values, indices = values.sort(dim=dim, descending=descending, stable=True)
    return values, indices


def count_below(sorted_Q: Tensor, bounds_E: Tensor) -> Tensor:
    """(…, E) int64: how many entries of each row of ``sorted_Q`` (…, Q), in ascending order, lie
    below each of ``bounds_E`` (E,) of the same dtype."""
    if onnx_exporting():  # ONNX has no binary search
        return (sorted_Q[..., None, :] < bounds_E[:, None]).sum(-1)
    return torch.searchsorted(sorted_Q, bounds_E.expand(*sorted_Q.shape[:-1], -1).contiguous())


def grouped_rows(x_RD: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """(R, N): ``grouped_matmul`` of rows sorted by expert, one product an expert."""
    number_R = torch.arange(x_RD.shape[0], device=x_RD.device)
    y_RN = x_RD.new_zeros(x_RD.shape[0], weight.shape[1])
    for expert in range(weight.shape[0]):
        own_R = (number_R >= offsets[expert]) & (number_R < offsets[expert + 1])
        own_r = own_R.nonzero()[:, 0]
        own_bias = None if bias is None else bias[expert]
        y_rN = torch.nn.functional.linear(x_RD[own_r], weight[expert], own_bias)
        y_RN = y_RN.index_add(0, own_r, y_rN)
    return y_RN
