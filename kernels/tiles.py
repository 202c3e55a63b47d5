"""The CPU loop: rows are cut into tiles of one expert, and the product of a tile takes the fastest
accurate route. On every device, derivatives beyond the first go through it, too.

Shape suffixes: R rows, r rows of a tile, D or N columns.
"""

import math
import platform
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.jit._trace import is_tracing

from ironmoe.kernels.route import forward_mode, transformed

# About 4 MiB of hidden units a tile: activation, gate product and second matmul then find them in
# cache, and the matrix product still has rows enough to pay for packing the expert's weights again
# (docs/kernels.md has the figures).
TILE_BYTES = 4 << 20
MIN_TILE_ROWS = 256
# Multiply-adds from which oneDNN pays, by dtype; 50 million are about 0.6 ms on two cores.
ONEDNN_MIN_PRODUCT = {torch.float32: 50_000_000, torch.bfloat16: 10_000_000}
# Or elements of a bfloat16 weight: to convert more of them costs more than the product of few rows.
ONEDNN_MIN_WEIGHT = 1_000_000
# oneDNN adds a product up in one chain: its largest error reaches twice that of BLAS from 256 terms
# on, more with length. So only a product that feeds another one takes it, up to this length: the
# second product averages the errors of the first. Without AVX-512 the chains are longer, and none
# takes it.
ONEDNN_MAX_LENGTH = 1024 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 0

# Rows of a bfloat16 product are filled up to one of these numbers, and above the last one to its
# multiple: oneDNN compiles each number of rows anew, which routing changes all the time.
ROWS_COMPILED = (0, 8, 16, 32, 64, 128)


def _multiplies_bfloat16() -> bool:
    """Whether oneDNN is there and finds instructions for bfloat16 products. It works without them,
    but 2 to 20 times slower than products in float32."""
    if not torch.backends.mkldnn.is_available():  # then its operators are not there, either
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


MULTIPLIES_BFLOAT16 = _multiplies_bfloat16()


class Tile(NamedTuple):
    """Rows ``start`` … ``stop − 1``, all of one expert. What one step of the CPU loop works on, as
    one program does on a GPU."""

    expert: int
    start: int
    stop: int


def tiles(offsets: Tensor, row_bytes: int) -> Iterator[Tile]:
    """Cut every expert's rows into equal tiles of about TILE_BYTES; an expert without rows has
    none.

    No rows at all make one empty tile, so that results stay connected to their inputs and gradients
    are zeros, not missing. Reads ``offsets`` on the host, so it belongs to the CPU path and to the
    tests.
    """
    # int: torch.jit's tracer gives sizes as tensors
    rows_per_tile = max(MIN_TILE_ROWS, TILE_BYTES // max(int(row_bytes), 1))
    bounds = offsets.tolist()
    if bounds[-1] == 0:
        yield Tile(0, 0, 0)
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        count = max(round((stop - start) / rows_per_tile), int(stop > start))
        for i in range(count):
            yield Tile(
                expert,
                start + (stop - start) * i // count,
                start + (stop - start) * (i + 1) // count,
            )


def matmul(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, feeds_product: bool = False
) -> Tensor:
    """a (R, M) @ b (M, N) + bias (N,), differentiable to any order; ``b`` may be a transposed view.

    On CPU the fastest accurate route by dtype and size (docs/kernels.md has the figures). oneDNN
    beats the BLAS behind ``mm`` on large float32 products, but rounds more, so it takes only those
    that feed another product. It compiles a kernel for every new number of rows, which small
    products never earn back; those take float32 BLAS, in bfloat16 too (its ``mm`` is oneDNN).
    float16 always does, and bfloat16 where the processor has no products of it: their own are up to
    100 and 20 times slower.
    """
    if a.device.type == "cpu" and a.dtype != torch.float64 and not is_tracing():
        large = a.shape[0] * a.shape[1] * b.shape[1] >= ONEDNN_MIN_PRODUCT.get(a.dtype, math.inf)
        if a.dtype != torch.float32 and not _own_product_pays(b, large=large):
            return matmul(a.float(), b.float(), None if bias is None else bias.float()).to(a.dtype)
        if feeds_product and large and a.dtype == torch.float32 and _onednn_takes(a, b, bias):
            return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
        if a.dtype == torch.bfloat16 and (rest := rows_compiled(a.shape[0]) - a.shape[0]):
            return matmul(torch.nn.functional.pad(a, (0, 0, 0, rest)), b, bias)[: a.shape[0]]
    return a @ b if bias is None else torch.addmm(bias, a, b)


def rows_compiled(rows: int) -> int:
    """How many rows a bfloat16 product of so many is computed for."""
    most = ROWS_COMPILED[-1]
    return next((each for each in ROWS_COMPILED if rows <= each), rows + -rows % most)


def _own_product_pays(b: Tensor, *, large: bool) -> bool:
    """Whether a product with b in its own 16 bits is faster than one in float32."""
    if b.dtype != torch.bfloat16 or not MULTIPLIES_BFLOAT16:
        return False
    return large or b.numel() >= ONEDNN_MIN_WEIGHT


def _onednn_takes(a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's linear layer may compute a @ b + bias.

    It must be there and round well enough. The layouts must be plain: on others it falls into a
    loop that is a thousand times slower. And nothing may record or trace the call: it has no
    derivative, and tracers do not know it.
    """
    tensors = (a, b, bias)
    return bool(
        a.shape[1] <= ONEDNN_MAX_LENGTH
        and a.is_contiguous()
        and (b.is_contiguous() or b.t().is_contiguous())
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and not (
            torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        )
        and not forward_mode()
        and not transformed()
        and not torch.compiler.is_compiling()
    )


def split_rows(rows_RD: Tensor, plan: list[Tile]) -> tuple[Tensor, ...]:
    """The rows of each tile, as views."""
    return rows_RD.split([tile.stop - tile.start for tile in plan])


def per_expert(stacked: Tensor | None, num_experts: int = 0) -> tuple[Any, ...]:
    """One view an expert, from one graph node: indexing each would give every expert a gradient of
    the size of all."""
    return (None,) * num_experts if stacked is None else stacked.unbind(0)


def stack_rows(tiles_rN: Sequence[Tensor], num_rows: int) -> Tensor:
    """(R, N) from the rows of all tiles; the rows of dropped choices, at the end, are 0."""
    dropped = num_rows - sum(len(tile) for tile in tiles_rN)
    return torch.cat([*tiles_rN, tiles_rN[0].new_zeros(dropped, tiles_rN[0].shape[1])])


class ExpertSum:
    """A gradient of all experts' weights, summed over tiles in float32 at least; experts without
    rows get 0. It is summed in place, unless autograd records.
    """

    def __init__(self, shape: torch.Size, like: Tensor, wanted: bool) -> None:
        self.dtype = like.dtype
        self.sum = like.new_zeros(shape, dtype=at_least_float32(like)) if wanted else None
        self.parts = [] if self.sum is None else list(self.sum.unbind(0))

    def add(self, expert: int, part: Tensor) -> None:
        """Add what a tile of this expert gives."""
        if torch.is_grad_enabled():
            self.parts[expert] = self.parts[expert] + part
        else:
            self.parts[expert].add_(part)

    def total(self) -> Tensor | None:
        """The sum in the dtype of the weights; None if it was not wanted."""
        if self.sum is None:
            return None
        return (torch.stack(self.parts) if torch.is_grad_enabled() else self.sum).to(self.dtype)


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """The dtype in which values of this tensor are summed."""
    return torch.promote_types(tensor.dtype, torch.float32)
