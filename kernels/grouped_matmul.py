"""Grouped matmul: rows sorted by expert times that expert's matrix."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# About 4 MiB of hidden units a tile: activation, gate product and second matmul then find them in cache, and the matrix
# product still has rows enough to pay for packing the expert's weights again (docs/kernels.md has the figures).
TILE_BYTES = 4 << 20
MIN_TILE_ROWS = 256
# Multiply-adds from which oneDNN pays, by dtype; 50 million are about 0.6 ms on two cores.
ONEDNN_MIN_PRODUCT = {torch.float32: 50_000_000, torch.bfloat16: 10_000_000}
# oneDNN adds a product up in one chain: its largest error reaches twice that of BLAS from 256 terms on, more with length. So
# only a product that feeds another one takes it, up to this length: the second product averages the errors of the first.
ONEDNN_MAX_LENGTH = 1024


class Tile(NamedTuple):
    """Rows ``start`` … ``stop − 1``, all of one expert. What one step of the CPU loop works on, as one program does on a GPU."""

    expert: int
    start: int
    stop: int


def tiles(offsets: Tensor, row_bytes: int) -> Iterator[Tile]:
    """Cut every expert's rows into equal tiles of about TILE_BYTES; an expert without rows has none.

    No rows at all make one empty tile, so that results stay connected to their inputs and gradients are zeros, not missing.
    Reads ``offsets`` on the host, so it belongs to the CPU path and to the tests.
    """
    rows_per_tile = max(MIN_TILE_ROWS, TILE_BYTES // max(row_bytes, 1))
    bounds = offsets.tolist()
    if bounds[-1] == 0:
        yield Tile(0, 0, 0)
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        count = max(round((stop - start) / rows_per_tile), int(stop > start))
        for i in range(count):
            yield Tile(expert, start + (stop - start) * i // count, start + (stop - start) * (i + 1) // count)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, *, feeds_product: bool = False) -> Tensor:
    """a (R, M) @ b (M, N) + bias (N,), differentiable to any order; ``b`` may be a transposed view.

    On CPU the fastest accurate route by dtype and size (docs/kernels.md has the figures). oneDNN beats the BLAS behind ``mm`` on
    large float32 products, but rounds more, so it takes only those that feed another product. It compiles a kernel for every
    new number of rows, which small products never earn back; those take float32 BLAS, in bfloat16 too (its ``mm`` is oneDNN).
    float16 always does: its own is 100 times slower.
    """
    if a.device.type == "cpu" and a.dtype != torch.float64:
        large = a.shape[0] * a.shape[1] * b.shape[1] >= ONEDNN_MIN_PRODUCT.get(a.dtype, math.inf)
        if a.dtype != torch.float32 and not large:
            return matmul(a.float(), b.float(), None if bias is None else bias.float()).to(a.dtype)
        if feeds_product and large and a.dtype == torch.float32 and _onednn_takes(a, b, bias):
            return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return a @ b if bias is None else torch.addmm(bias, a, b)


def _onednn_takes(a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """oneDNN's linear layer is there, rounds well enough, the layouts are plain (on others it falls into a loop a thousand times slower), and
    nobody watches: it has no derivative, and tracers do not know it."""
    tensors = (a, b, bias)
    return bool(
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
    plan = list(tiles(offsets, max(weight.shape[1:]) * x.element_size()))
    rows = tile_rows(x[: plan[-1].stop], plan)
    weights, biases = per_expert(weight.transpose(1, 2)), per_expert(bias, len(weight))
    outputs = [matmul(x_rD, weights[t.expert], biases[t.expert]) for x_rD, t in zip(rows, plan, strict=True)]
    return torch.cat([*outputs, x.new_zeros(len(x) - plan[-1].stop, weight.shape[1])])


def tile_rows(rows_RD: Tensor, plan: list[Tile]) -> tuple[Tensor, ...]:
    """The rows of each tile, as views."""
    return rows_RD.split([tile.stop - tile.start for tile in plan])


def per_expert(stacked: Tensor | None, num_experts: int = 0) -> tuple[Any, ...]:
    """One view an expert, from one graph node: indexing each would give every expert a gradient of the size of all."""
    return (None,) * num_experts if stacked is None else stacked.unbind(0)


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
