"""Gather-and-sum over a token's K rows, and its backward. float32 sums in the order of the choices;
no atomics.

Shape suffixes: T tokens of a program, R rows (or choices) of a program, D columns of a block; in
the launchers T tokens, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ironmoe.kernels.gpu.launch import cdiv, launch, next_power_of_2

TILE_ELEMENTS = 2048  # of an output tile: 8 KB of float32 accumulators over 4 warps


@triton.jit(do_not_specialize=["num_tokens"])
def gather_sum_kernel(
    rows,
    gates,
    slot_row,
    out,
    num_tokens,
    D,
    row_stride,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = Σ_k gates[t, k] · rows[slot_row[t, k]]; without gates, the plain sum. A dropped
    choice (−1) is not read."""
    blocks_d = tl.cdiv(D, BLOCK_D)
    t_T = (tl.program_id(0) // blocks_d).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d_D = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)

    sum_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(TOP_K):
        row_T = tl.load(slot_row + t_T * TOP_K + k, mask=t_T < num_tokens, other=-1)
        inside_TD = (row_T >= 0)[:, None] & (d_D < D)[None, :]
        value_TD = tl.load(
            rows + row_T.to(tl.int64)[:, None] * row_stride + d_D[None, :],
            mask=inside_TD,
            other=0.0,
        )
        if gates is None:
            sum_TD += value_TD.to(tl.float32)
        else:
            gate_T = tl.load(gates + t_T * TOP_K + k, mask=row_T >= 0, other=0.0)
            sum_TD += value_TD.to(tl.float32) * gate_T[:, None]

    target_TD = out + t_T[:, None] * D + d_D[None, :]
    tl.store(
        target_TD,
        sum_TD.to(out.dtype.element_ty),
        mask=(t_T < num_tokens)[:, None] & (d_D < D)[None, :],
    )


@triton.jit(do_not_specialize=["num_rows", "top_k"])
def scatter_rows_kernel(
    dy,
    gates,
    row_token,
    row_slot,
    slot_row,
    d_rows,
    num_rows,
    top_k,
    D,
    dy_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_rows[r] = gate of the row · dy[token of r]; 0 for the rows of dropped choices.

    Tokens and choices stay int32 (there are fewer than 2³¹ choices) up to the last load that they
    lead to: Triton 3.6 and 3.7 take a layout conversion back through a widening between two loads,
    and then give the second load a mask in another layout.
    """
    blocks_d = tl.cdiv(D, BLOCK_D)
    r_R = (tl.program_id(0) // blocks_d).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d_D = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)

    token_R = tl.load(row_token + r_R, mask=r_R < num_rows, other=0)
    choice_R = token_R * top_k + tl.load(row_slot + r_R, mask=r_R < num_rows, other=0)
    kept_R = (r_R < num_rows) & (tl.load(slot_row + choice_R, mask=r_R < num_rows, other=-1) >= 0)
    gate_R = tl.load(gates + choice_R, mask=kept_R, other=0.0)

    inside_RD = kept_R[:, None] & (d_D < D)[None, :]
    value_RD = tl.load(
        dy + token_R.to(tl.int64)[:, None] * dy_stride + d_D[None, :], mask=inside_RD, other=0.0
    ).to(tl.float32)

    target_RD = d_rows + r_R[:, None] * D + d_D[None, :]
    value_RD = (value_RD * gate_R[:, None]).to(d_rows.dtype.element_ty)
    tl.store(target_RD, value_RD, mask=(r_R < num_rows)[:, None] & (d_D < D)[None, :])


@triton.jit(do_not_specialize=["num_choices", "top_k"])
def row_dot_kernel(
    dy,
    rows,
    slot_row,
    d_gates,
    num_choices,
    top_k,
    D,
    dy_stride,
    row_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_gates[t, k] = ⟨dy[t], rows[slot_row[t, k]]⟩; 0 for a dropped choice."""
    i_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_R = tl.load(slot_row + i_R, mask=i_R < num_choices, other=-1)

    dot_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        d_D = d + tl.arange(0, BLOCK_D)
        inside_RD = (row_R >= 0)[:, None] & (d_D < D)[None, :]
        dy_RD = tl.load(
            dy + (i_R // top_k)[:, None] * dy_stride + d_D[None, :], mask=inside_RD, other=0.0
        )
        row_RD = tl.load(
            rows + row_R.to(tl.int64)[:, None] * row_stride + d_D[None, :],
            mask=inside_RD,
            other=0.0,
        )
        dot_RD += dy_RD.to(tl.float32) * row_RD.to(tl.float32)
    tl.store(d_gates + i_R, tl.sum(dot_RD, 1), mask=i_R < num_choices)


def combine(rows: Tensor, gates: Tensor | None, slot_row: Tensor) -> Tensor:
    """(T, D) in the dtype of ``rows`` (R, D)."""
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    T, top_k = slot_row.shape
    D = rows.shape[1]
    out = rows.new_empty(T, D)
    block_t, block_d = _block(D)
    launch(
        gather_sum_kernel,
        cdiv(T, block_t) * cdiv(D, block_d),
        rows=rows,
        gates=None if gates is None else gates.to(torch.float32).contiguous(),
        slot_row=slot_row,
        out=out,
        num_tokens=T,
        D=D,
        row_stride=rows.stride(0),
        TOP_K=top_k,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
    )
    return out


def combine_backward(
    dy: Tensor,
    rows: Tensor,
    gates: Tensor,
    row_token: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    *,
    want_rows: bool,
    want_gates: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(d_rows like ``rows``, d_gates (T, K) float32), each None if not wanted."""
    dy, rows = (t if t.stride(-1) == 1 else t.contiguous() for t in (dy, rows))
    gates = gates.to(torch.float32).contiguous()
    num_rows, D = rows.shape
    top_k = gates.shape[1]
    block_r, block_d = _block(D)
    d_rows = rows.new_empty(num_rows, D) if want_rows else None
    d_gates = torch.empty_like(gates) if want_gates else None

    if d_rows is not None:
        launch(
            scatter_rows_kernel,
            cdiv(num_rows, block_r) * cdiv(D, block_d),
            dy=dy,
            gates=gates,
            row_token=row_token,
            row_slot=row_slot,
            slot_row=slot_row,
            d_rows=d_rows,
            num_rows=num_rows,
            top_k=top_k,
            D=D,
            dy_stride=dy.stride(0),
            BLOCK_R=block_r,
            BLOCK_D=block_d,
        )
    if d_gates is not None:
        launch(
            row_dot_kernel,
            cdiv(gates.numel(), 16),
            dy=dy,
            rows=rows,
            slot_row=slot_row,
            d_gates=d_gates,
            num_choices=gates.numel(),
            top_k=top_k,
            D=D,
            dy_stride=dy.stride(0),
            row_stride=rows.stride(0),
            BLOCK_R=16,
            BLOCK_D=128,
        )
    return d_rows, d_gates


def _block(D: int) -> tuple[int, int]:
    """(rows, columns) of a tile: whole rows where they are short."""
    columns = min(next_power_of_2(max(D, 1)), 1024)
    return max(TILE_ELEMENTS // columns, 1), columns
