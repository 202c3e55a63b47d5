"""Sums over the rows of each expert: weight gradients (a product with the rows as its inner axis)
and bias gradients.

Every block of the result is written by exactly one program. So experts without rows get zeros, and
no order is left to chance.

Shape suffixes: K rows of a step (R in ``expert_sum``), M columns of the left operand, N columns of
the right one or of the source.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ironmoe.kernels.gpu.launch import cdiv, launch
from ironmoe.kernels.gpu.operands import are_aligned
from ironmoe.kernels.tuning import blocks_for, chip_of

SUM_ROWS, SUM_COLUMNS = 64, 64


@triton.jit
def load_block(source, token, rows_K, live_K, n_N, N, stride):
    """(K, N) of ``source``: its rows, or with ``token`` the rows of their tokens; zeros where there
    is no row."""
    from_K = rows_K if token is None else tl.load(token + rows_K, mask=live_K, other=0)
    pointer_KN = source + from_K.to(tl.int64)[:, None] * stride + n_N[None, :]
    return tl.load(pointer_KN, mask=live_K[:, None] & (n_N < N)[None, :], other=0.0)


@triton.jit
def weight_gradient_kernel(
    left,
    left_token,
    left_stride,
    right,
    right_token,
    right_stride,
    out,
    offsets,
    M,
    N,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[e] (M, N) = Σ over rows r of e of left[r]ᵀ right[r]. Each operand is read once for every
    block of columns of the other one."""
    BLOCK_M: tl.constexpr = BLOCKS.m
    BLOCK_N: tl.constexpr = BLOCKS.n
    BLOCK_K: tl.constexpr = BLOCKS.k

    blocks_n = tl.cdiv(N, BLOCK_N)
    per_expert = tl.cdiv(M, BLOCK_M) * blocks_n
    expert = tl.program_id(0) // per_expert
    within = tl.program_id(0) % per_expert
    m_M = within // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = within % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)

    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(start, stop, BLOCK_K):
        rows_K = first + tl.arange(0, BLOCK_K)
        live_K = rows_K < stop
        left_KM = load_block(left, left_token, rows_K, live_K, m_M, M, stride=left_stride)
        right_KN = load_block(right, right_token, rows_K, live_K, n_N, N, stride=right_stride)
        acc_MN = tl.dot(left_KM.T, right_KN, acc_MN, input_precision=PRECISION)

    target_MN = out + expert.to(tl.int64) * M * N + m_M.to(tl.int64)[:, None] * N + n_N[None, :]
    tl.store(
        target_MN, acc_MN.to(out.dtype.element_ty), mask=(m_M < M)[:, None] & (n_N < N)[None, :]
    )


@triton.jit(do_not_specialize=["top_k"])
def expert_sum_kernel(
    source,
    gates,
    row_token,
    row_slot,
    out,
    offsets,
    N,
    stride,
    top_k,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[e] (N) = Σ over rows r of e of source[r], or of gate · source[token of r] where gates are
    given."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // blocks_n
    n_N = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)

    acc_RN = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for first in tl.range(start, stop, BLOCK_R):
        rows_R = first + tl.arange(0, BLOCK_R)
        live_R = rows_R < stop
        values_RN = load_block(source, row_token, rows_R, live_R, n_N, N, stride=stride)
        values_RN = values_RN.to(tl.float32)
        if gates is not None:
            token_R = tl.load(row_token + rows_R, mask=live_R, other=0).to(tl.int64)
            slot_R = tl.load(row_slot + rows_R, mask=live_R, other=0)
            values_RN *= tl.load(gates + token_R * top_k + slot_R, mask=live_R, other=0.0)[:, None]
        acc_RN += values_RN

    sum_N = tl.sum(acc_RN, 0).to(out.dtype.element_ty)
    tl.store(out + expert.to(tl.int64) * N + n_N, sum_N, mask=n_N < N)


def weight_gradient(
    left: Tensor,
    left_token: Tensor | None,
    right: Tensor,
    right_token: Tensor | None,
    offsets: Tensor,
    precision: str,
) -> Tensor:
    """(E, M, N) from rows (·, M) and (·, N), each read through a token index (R,) or in order;
    dtype of ``left``."""
    left, right = (t if t.stride(-1) == 1 else t.contiguous() for t in (left, right))
    num_experts = offsets.numel() - 1
    M, N = left.shape[1], right.shape[1]
    out = left.new_empty(num_experts, M, N)
    aligned = are_aligned(left, right)
    blocks = blocks_for("weight_gradient", left.dtype, 128, chip_of(left), aligned)
    # A load of tokens takes a stage, so 7 stages hold 4 steps. Without it every stage holds a step.
    gathers = left_token is not None or right_token is not None
    stages = blocks.stages if gathers else min(blocks.stages, 4)
    launch(
        weight_gradient_kernel,
        num_experts * cdiv(M, blocks.m) * cdiv(N, blocks.n),
        blocks.warps,
        stages,
        left=left,
        left_token=left_token,
        left_stride=left.stride(0),
        right=right,
        right_token=right_token,
        right_stride=right.stride(0),
        out=out,
        offsets=offsets,
        M=M,
        N=N,
        BLOCKS=blocks,
        PRECISION=precision,
    )
    return out


def expert_sum(
    source: Tensor,
    offsets: Tensor,
    gates: Tensor | None = None,
    row_token: Tensor | None = None,
    row_slot: Tensor | None = None,
) -> Tensor:
    """(E, N) sums over each expert's rows of ``source`` (R, N), or of gate · ``source`` (T, N) at
    the row's token."""
    source = source if source.stride(-1) == 1 else source.contiguous()
    num_experts, N = offsets.numel() - 1, source.shape[1]
    out = source.new_empty(num_experts, N)
    launch(
        expert_sum_kernel,
        num_experts * cdiv(N, SUM_COLUMNS),
        source=source,
        gates=None if gates is None else gates.to(torch.float32).contiguous(),
        row_token=row_token,
        row_slot=row_slot,
        out=out,
        offsets=offsets,
        N=N,
        stride=source.stride(0),
        top_k=1 if gates is None else gates.shape[1],
        BLOCK_R=SUM_ROWS,
        BLOCK_N=SUM_COLUMNS,
    )
    return out
