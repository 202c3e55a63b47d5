"""The product of a tile with its expert's weights, in float32: the inner loop of every kernel that
walks over tiles.

Weights come through a TMA descriptor where the chip has one: that frees the registers of their
pointers, which with two accumulators is the difference between spilling and not (docs/kernels.md).

Shape suffixes: M rows of a tile, N columns of a block, W columns of a block of gate and up
together, K terms of a step. This file does not know where rows come from or results go.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ironmoe.kernels.gpu.tiles import halves


class Source(NamedTuple):
    """Rows that a product reads: ``rows_M`` of ``pointer``, or by TMA from the tile's first on."""

    pointer: Any
    stride: Any
    rows_M: Any


class Weights(NamedTuple):
    """The matrices of all experts (E, N, K), any strides; of a gated unit (E, 2N, K)."""

    pointer: Any
    e_stride: Any
    n_stride: Any
    k_stride: Any
    N: Any


class Access(NamedTuple):
    """How a kernel reads its operands and writes its results; a constant of the compiler.

    x_tma, w_tma, store_tma: TMA brings rows, brings weights, takes the results of whole tiles.
    k_last: the terms are the weights' last axis in memory. box: one TMA box has the same columns of
    gate and of up, and both are one product. even: no block reaches beyond columns or terms.
    """

    x_tma: bool
    w_tma: bool
    store_tma: bool
    k_last: bool
    box: bool
    even: bool


@triton.jit
def accumulate(
    source, weights, tile, n0, terms,
    GATED: tl.constexpr, BLOCKS: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """source[rows] @ weights[expert]ᵀ over ``terms`` terms: (columns n0 …, those N further on for
    GATED)."""
    BLOCK_M: tl.constexpr = BLOCKS.m
    BLOCK_N: tl.constexpr = BLOCKS.n
    BLOCK_K: tl.constexpr = BLOCKS.k
    BOX: tl.constexpr = ACCESS.box
    X_TMA: tl.constexpr = ACCESS.x_tma
    W_TMA: tl.constexpr = ACCESS.w_tma
    K_LAST: tl.constexpr = ACCESS.k_last
    EVEN: tl.constexpr = ACCESS.even
    WIDE: tl.constexpr = 2 * BLOCK_N if BOX else BLOCK_N

    x, w = source.pointer, weights.pointer
    N = weights.N
    acc_MW = tl.zeros((BLOCK_M, WIDE), tl.float32)
    up_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if GATED and not BOX else acc_MW
    k_K = tl.arange(0, BLOCK_K)
    n_N = n0 + tl.arange(0, BLOCK_N)
    if not X_TMA:
        x_MK = x + source.rows_M.to(tl.int64)[:, None] * source.stride + k_K[None, :]
    if not W_TMA:
        w_N = w + tile.expert.to(tl.int64) * weights.e_stride + n_N.to(tl.int64) * weights.n_stride
        w_KN = w_N[None, :] + k_K[:, None].to(tl.int64) * weights.k_stride

    for k in tl.range(0, terms, BLOCK_K):
        if X_TMA:
            a_MK = x.load([tile.first, k])
        elif EVEN:
            a_MK = tl.load(x_MK + k, mask=tile.live_M[:, None], other=0.0)
        else:
            inside_MK = tile.live_M[:, None] & ((k + k_K)[None, :] < terms)
            a_MK = tl.load(x_MK + k, mask=inside_MK, other=0.0)

        if W_TMA:
            b_KW = load_box(
                w, tile.expert, n0, k, WIDE=WIDE, BLOCK_K=BLOCK_K, K_LAST=K_LAST, BOX=BOX
            )
        elif EVEN:
            b_KW = tl.load(w_KN + k * weights.k_stride)
        else:
            inside_KN = ((k + k_K)[:, None] < terms) & (n_N[None, :] < N)
            b_KW = tl.load(w_KN + k * weights.k_stride, mask=inside_KN, other=0.0)
        acc_MW = tl.dot(a_MK, b_KW, acc_MW, input_precision=PRECISION)

        if GATED and not BOX:
            if W_TMA:
                b_KN = load_box(
                    w, tile.expert, N + n0, k,
                    WIDE=BLOCK_N, BLOCK_K=BLOCK_K, K_LAST=K_LAST, BOX=False,
                )  # fmt: skip
            elif EVEN:
                b_KN = tl.load(w_KN + k * weights.k_stride + N * weights.n_stride)
            else:
                up_KN = w_KN + k * weights.k_stride + N * weights.n_stride
                b_KN = tl.load(up_KN, mask=inside_KN, other=0.0)
            up_MN = tl.dot(a_MK, b_KN, up_MN, input_precision=PRECISION)

    if BOX:
        return halves(acc_MW)
    else:
        return acc_MW, up_MN


@triton.jit
def load_box(
    w, expert, n0, k,
    WIDE: tl.constexpr, BLOCK_K: tl.constexpr, K_LAST: tl.constexpr, BOX: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K, WIDE) of the expert's weights by TMA. BOX: gate's columns, then the same of up."""
    if BOX and K_LAST:
        return w.load([expert, 0, n0, k]).reshape(WIDE, BLOCK_K).T
    elif BOX:
        return w.load([expert, k, 0, n0]).reshape(BLOCK_K, WIDE)
    elif K_LAST:
        return w.load([expert, n0, k]).reshape(WIDE, BLOCK_K).T
    else:
        return w.load([expert, k, n0]).reshape(BLOCK_K, WIDE)
