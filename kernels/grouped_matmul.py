"""Grouped matmul: rows sorted by expert times that expert's matrix."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# About 4 MiB of hidden units a tile: activation, gate product and second matmul then find them in cache, and the matrix
# product still has rows enough to pay for packing the expert's weights again (docs/kernels.md has the figures).
TILE_BYTES = 4 << 20
MIN_TILE_ROWS = 256


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
    for expert, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        count = max(round((stop - start) / tile_rows), int(stop > start))
        for i in range(count):
            yield Tile(expert, start + (stop - start) * i // count, start + (stop - start) * (i + 1) // count)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (R, M) @ b (M, N) + bias (N,), differentiable to any order; ``b`` may be a transposed view.

    On CPU the fastest exact route for the dtype: oneDNN for float32 (1.2 to 1.5 times as fast as the BLAS behind ``mm`` on
    small groups), float32 arithmetic for float16 (up to 100 times as fast as ``mm``, and closer), ``mm`` for the rest.
    """
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, bias))
    if not wants_grad and _onednn_takes(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    if a.dtype == torch.float16 and a.device.type == "cpu":
        return matmul(a.float(), b.float(), None if bias is None else bias.float()).half()
    return a @ b if bias is None else torch.addmm(bias, a, b)


def _onednn_takes(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and min(*a.shape, b.shape[1]) > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and type(a) is type(b) is Tensor
        and not torch.compiler.is_compiling()
    )


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
