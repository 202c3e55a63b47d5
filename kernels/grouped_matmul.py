"""Grouped matmul: rows sorted by expert times that expert's matrix."""

from collections.abc import Iterator
import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# About 4 MiB of hidden units a tile: activation, gate product and second matmul then find them in cache, and the matrix
# product still has rows enough to pay for packing the expert's weights again (docs/kernels.md has the figures).
TILE_BYTES = 4 << 20
MIN_TILE_ROWS = 256
# Multiply-adds from which oneDNN pays, by dtype; 50 million are about 0.6 ms on two cores.
ONEDNN_MIN_PRODUCT = {torch.float32: 50_000_000, torch.bfloat16: 10_000_000}
ONEDNN_MAX_LENGTH = 1024


class Tile(NamedTuple):
    """Rows ``start`` … ``stop − 1``, all of one expert. What one step of the CPU loop works on, as one program does on a GPU."""

    expert: int
    start: int
    stop: int


def tiles(offsets: Tensor, row_bytes: int) -> Iterator[Tile]:
    """Cut every expert's rows into equal tiles of about TILE_BYTES; an expert without rows has none.

    Reads ``offsets`` on the host, so it belongs to the CPU path and to the tests.
    """
    tile_rows = max(MIN_TILE_ROWS, TILE_BYTES // max(row_bytes, 1))
    bounds = offsets.tolist()
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        count = max(round((stop - start) / tile_rows), int(stop > start))
        for i in range(count):
            yield Tile(expert, start + (stop - start) * i // count, start + (stop - start) * (i + 1) // count)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (R, M) @ b (M, N) + bias (N,), differentiable to any order; ``b`` may be a transposed view.

    On CPU the fastest exact route by dtype and size (docs/kernels.md has the figures). oneDNN beats the BLAS behind ``mm`` on
    large float32 products, but compiles a kernel for every new number of rows, which small products never earn back; those
    take float32 BLAS, in bfloat16 too (its ``mm`` is oneDNN). float16 always does: its ``mm`` is up to 100 times slower.
    """
    if a.device.type == "cpu" and a.dtype != torch.float64:
        large = a.shape[0] * a.shape[1] * b.shape[1] >= ONEDNN_MIN_PRODUCT.get(a.dtype, math.inf)
        if a.dtype != torch.float32 and not large:
            return matmul(a.float(), b.float(), None if bias is None else bias.float()).to(a.dtype)
        if large and a.dtype == torch.float32 and _onednn_takes(a, b, bias):
            return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return a @ b if bias is None else torch.addmm(bias, a, b)


def _onednn_takes(a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """oneDNN's linear layer is there, is accurate and fast here, and nobody watches.

    It adds up in one chain, so its error grows with the length: past ONEDNN_MAX_LENGTH above twice that of ``mm``. On strides
    that are not plain it falls into a loop a thousand times slower. It has no derivative, and tracers do not know it.
    """
    tensors = (a, b, bias)
    return (
        a.shape[1] <= ONEDNN_MAX_LENGTH
        and a.is_contiguous()
        and (b.is_contiguous() or b.t().is_contiguous())
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
        and not torch.compiler.is_compiling()
    )


if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return 2 * a_shape[0] * b_shape[0] * b_shape[1]


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """y[r] = weight[e] @ x[r] + bias[e] for each row r of expert e; rows past offsets[E] are 0.

    Args:
        x: (R, D) rows sorted by expert.
        weight: (E, N, D), each expert's matrix as nn.Linear stores it.
        offsets: (E + 1,) int32, as ``plan_dispatch`` gives them.
        bias: (E, N) or None.

    Returns:
        (R, N) in the dtype of ``x``. Differentiable to any order; the gradient of ``weight`` is computed only where it is asked for.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    check_experts(x, weight, bias, "weight", "bias")
    if offsets.shape != (weight.shape[0] + 1,):
        raise ValueError(f"offsets must have shape ({weight.shape[0] + 1},), one more than experts, got {tuple(offsets.shape)}")
    weights = weight.unbind(0)  # one node for all experts: indexing each would make E gradients of the size of all
    biases = bias.unbind(0) if bias is not None else (None,) * len(weights)
    row_bytes = max(weight.shape[1:]) * x.element_size()
    outputs = [matmul(x[t.start : t.stop], weights[t.expert].t(), biases[t.expert]) for t in tiles(offsets, row_bytes)]
    outputs.append(x.new_zeros(x.shape[0] - int(offsets[-1]), weight.shape[1]))
    return torch.cat(outputs)


def check_experts(x: Tensor, weight: Tensor, bias: Tensor | None, weight_name: str, bias_name: str) -> None:
    """Name the argument that does not fit: x (R, D), weight (E, N, D), bias (E, N), one dtype, one device."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a float matrix of rows (·, D), got {x.dtype} of shape {tuple(x.shape)}")
    if weight.ndim != 3 or weight.shape[2] != x.shape[1]:
        raise ValueError(f"{weight_name} must have shape (E, ·, {x.shape[1]}) to match x, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(
            f"{bias_name} must have shape {tuple(weight.shape[:2])} to match {weight_name}, got {tuple(bias.shape)}"
        )
    for name, tensor in ((weight_name, weight), (bias_name, bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name} must be {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}")
