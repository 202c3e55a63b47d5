"""The backward of activation, gate and second layer in one pass: dH, the gate gradient, and the
gated units for dW₂.

dA′ = dO W₂ before gating, so that ⟨dA′, A⟩ is the gate's gradient and a gate of 0 is exact
(SonicMoE, arXiv 2512.14080). Neither the second layer's output nor its gradient ever exists.
Partial dot products of the blocks of columns are stored and added in
order by ``gate_gradient_kernel``: no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ironmoe.kernels.activations import GATED_ACTIVATIONS, INTERLEAVED_ACTIVATIONS
from ironmoe.kernels.gpu.activations import unit
from ironmoe.kernels.gpu.grouped_matmul import (
    accumulate,
    are_aligned,
    halves,
    locate,
    neighbours,
    output_box,
    store_rows,
    tile_rows,
    weight_layout,
    weight_operand,
)
from ironmoe.kernels.gpu.launch import cdiv, launch
from ironmoe.kernels.tuning import blocks_for, chip_of, rows_per_tile

DOT_COLUMNS = 32


@triton.jit
def load_hidden(
    hidden, n0, rows_M, live_M, N, hidden_stride,
    BLOCK_N: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of H: (gate or the only half, up). In turns they are one block, twice as
    wide."""
    WIDE: tl.constexpr = 2 * BLOCK_N if INTERLEAVED else BLOCK_N
    n_W = n0 * (WIDE // BLOCK_N) + tl.arange(0, WIDE)
    at_MW = rows_M.to(tl.int64)[:, None] * hidden_stride + n_W[None, :]
    inside_MW = live_M[:, None] & (n_W < N * (WIDE // BLOCK_N))[None, :]
    h_MW = tl.load(hidden + at_MW, mask=inside_MW, other=0.0)
    up_MW = tl.load(hidden + at_MW + N, mask=inside_MW, other=0.0) if GATED else h_MW
    return h_MW, up_MW


@triton.jit
def through_unit(
    acc_MC, h_MW, up_MW, n0, hidden, d_hidden, d_hidden_tma, gated, gated_tma, gate_M, rows_M,
    live_M,
    first, full, N, hidden_stride, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, PRELOAD: tl.constexpr, STORE_TMA: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Some columns of dA′ through the activation, in SPLIT parts; returns their ⟨dA′, A⟩ (M,)."""
    if SPLIT > 1:
        left, right = halves(acc_MC)
        h_left, h_right = halves(h_MW) if PRELOAD else (left, right)
        up_left, up_right = halves(up_MW) if PRELOAD else (left, right)
        dot_left_M = through_unit(
            left, h_left, up_left, n0, hidden, d_hidden, d_hidden_tma, gated, gated_tma, gate_M,
            rows_M, live_M, first, full, N, hidden_stride, ACTIVATION, GATED, INTERLEAVED, PRELOAD,
            STORE_TMA, SPLIT // 2,
        )  # fmt: skip
        dot_right_M = through_unit(
            right, h_right, up_right, n0 + right.shape[1], hidden, d_hidden, d_hidden_tma, gated,
            gated_tma, gate_M, rows_M, live_M, first, full, N, hidden_stride, ACTIVATION, GATED,
            INTERLEAVED, PRELOAD, STORE_TMA, SPLIT // 2,
        )  # fmt: skip
        return dot_left_M + dot_right_M
    else:
        if not PRELOAD:
            C: tl.constexpr = acc_MC.shape[1]
            h_MW, up_MW = load_hidden(
                hidden, n0, rows_M, live_M, N, hidden_stride, C, GATED, INTERLEAVED
            )  # fmt: skip
        h_MC, up_MC = neighbours(h_MW) if INTERLEAVED else (h_MW, up_MW)
        h_MC, up_MC = h_MC.to(tl.float32), up_MC.to(tl.float32)
        value_MC, slope_MC, up_slope_MC = unit(h_MC, up_MC, ACTIVATION)

        if PRELOAD:
            # Rows that are not the tile's have a dA′ of 0 and no result. A value that hangs on dA′
            # is computed once, in the layout of dA′; without this the compiler computes it from H
            # a second time, in the layout of the stores.
            value_MC = tl.where(live_M[:, None], value_MC, acc_MC)

        if gated is not None:
            gated_MC = value_MC * gate_M[:, None]
            store_rows(
                gated_MC, gated, gated_tma, rows_M, live_M, first, n0, 0, N, N, full, STORE_TMA
            )
        if d_hidden is not None:
            d_value_MC = acc_MC * gate_M[:, None]
            d_h_MC, d_up_MC = d_value_MC * slope_MC, d_value_MC * up_slope_MC
            if INTERLEAVED:
                d_MW = tl.join(d_h_MC, d_up_MC).reshape(acc_MC.shape[0], 2 * acc_MC.shape[1])
                store_rows(
                    d_MW, d_hidden, d_hidden_tma, rows_M, live_M, first, 2 * n0, 0, 2 * N,
                    hidden_stride, full, STORE_TMA,
                )  # fmt: skip
            else:
                store_rows(
                    d_h_MC, d_hidden, d_hidden_tma, rows_M, live_M, first, n0, 0, N, hidden_stride,
                    full, STORE_TMA,
                )  # fmt: skip
                if GATED:
                    store_rows(
                        d_up_MC, d_hidden, d_hidden_tma, rows_M, live_M, first, n0, 1, N,
                        hidden_stride, full, STORE_TMA,
                    )  # fmt: skip

        n_C = n0 + tl.arange(0, acc_MC.shape[1])
        inside_MC = live_M[:, None] & (n_C < N)[None, :]
        return tl.sum(tl.where(inside_MC, acc_MC * value_MC, 0.0), 1)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "num_rows", "num_experts", "top_k"])
def hidden_gradient_kernel(
    dy, w, gates, hidden, d_hidden, d_hidden_tma, gated, gated_tma, partial, row_token, row_slot,
    offsets, tiles, num_tiles, num_blocks, num_rows, num_experts, top_k, N, K, dy_stride, we_stride,
    wn_stride, wk_stride, hidden_stride, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, PRELOAD: tl.constexpr, W_TMA: tl.constexpr,
    STORE_TMA: tl.constexpr, K_LAST: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads dO through ``row_token``, W₂ and H. Writes dH (R, N | 2N), gated units (R, N) and
    partial dots (blocks, R), those that are given.

    PRELOAD asks for H before the product, which then hides the way from memory.
    """
    for program in range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        tile, block = locate(program, num_tiles, num_blocks, GROUP)
        expert = tl.load(tiles + tile)
        if expert >= 0:
            first, rows_M, live_M, full = tile_rows(
                tiles, tile, num_tiles, offsets, expert, num_experts, num_rows, BLOCK_M
            )  # fmt: skip
            token_M = tl.load(row_token + rows_M, mask=live_M, other=0)
            kept_M = live_M & (rows_M < tl.where(expert < num_experts, num_rows, 0))
            slot_M = tl.load(row_slot + rows_M, mask=live_M, other=0)
            gate_M = tl.load(gates + token_M.to(tl.int64) * top_k + slot_M, mask=kept_M, other=0.0)
            n0 = block * BLOCK_N

            h_MW, up_MW = gate_M, gate_M  # nobody reads these
            if PRELOAD:
                h_MW, up_MW = load_hidden(
                    hidden, n0, rows_M, live_M, N, hidden_stride, BLOCK_N, GATED, INTERLEAVED
                )  # fmt: skip
            terms = tl.where(expert < num_experts, K, 0)
            acc_MN, _ = accumulate(
                dy, w, token_M, live_M, first, expert, n0, 0, N, terms, dy_stride, we_stride,
                wn_stride, wk_stride, BLOCK_M, BLOCK_N, BLOCK_K, False, W_TMA, K_LAST, False, False,
                EVEN, PRECISION,
            )  # fmt: skip
            dot_M = through_unit(
                acc_MN, h_MW, up_MW, n0, hidden, d_hidden, d_hidden_tma, gated, gated_tma, gate_M,
                rows_M, live_M, first, full, N, hidden_stride, ACTIVATION, GATED, INTERLEAVED,
                PRELOAD, STORE_TMA, SPLIT,
            )  # fmt: skip
            if partial is not None:
                tl.store(partial + block.to(tl.int64) * num_rows + rows_M, dot_M, mask=live_M)


@triton.jit(do_not_specialize=["num_tiles", "num_rows", "num_experts"])
def bias_dot_kernel(
    dy, bias, partial, row_token, offsets, tiles, num_tiles, num_rows, num_experts, K, dy_stride,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[r] = ⟨dO of the row's token, b₂ of its expert⟩."""
    tile = tl.program_id(0)
    expert = tl.load(tiles + tile)
    if expert >= 0:
        _, rows_M, live_M, _ = tile_rows(
            tiles, tile, num_tiles, offsets, expert, num_experts, num_rows, BLOCK_M
        )
        token_M = tl.load(row_token + rows_M, mask=live_M, other=0)
        dot_MK = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for k in tl.range(0, tl.where(expert < num_experts, K, 0), BLOCK_K):
            k_K = k + tl.arange(0, BLOCK_K)
            at_MK = token_M.to(tl.int64)[:, None] * dy_stride + k_K[None, :]
            dy_MK = tl.load(dy + at_MK, mask=live_M[:, None] & (k_K < K)[None, :], other=0.0).to(
                tl.float32
            )
            dot_MK += (
                dy_MK
                * tl.load(bias + expert.to(tl.int64) * K + k_K, mask=k_K < K, other=0.0).to(
                    tl.float32
                )[None, :]
            )
        tl.store(partial + rows_M, tl.sum(dot_MK, 1), mask=live_M)


@triton.jit(do_not_specialize=["num_choices", "num_partials", "num_rows"])
def gate_gradient_kernel(
    partial, slot_row, d_gates, num_choices, num_partials, num_rows, BLOCK: tl.constexpr
):
    """d_gates[t, k] = the sum of its row's partial dots, in order; 0 for a dropped choice."""
    i_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_B = tl.load(slot_row + i_B, mask=i_B < num_choices, other=-1)
    dot_B = tl.zeros((BLOCK,), tl.float32)
    part_B = partial + row_B
    for _ in range(num_partials):
        dot_B += tl.load(part_B, mask=row_B >= 0, other=0.0)
        part_B += num_rows
    tl.store(d_gates + i_B, dot_B, mask=i_B < num_choices)


def hidden_gradient(
    dy: Tensor, gates: Tensor, w_out: Tensor, b_out: Tensor | None, hidden: Tensor, offsets: Tensor,
    row_token: Tensor,
    row_slot: Tensor, slot_row: Tensor, tiles: Tensor, activation: str, precision: str,
    want_gates: bool, want_hidden: bool, want_gated: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(d_gates (T, K) float32, dH like H, gated units (R, F)), each None if not wanted. dW₂ alone
    costs no product."""
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    gates = gates.to(torch.float32).contiguous()
    num_experts, K, N = w_out.shape
    num_rows = len(row_token)
    chip = chip_of(dy)
    weight = w_out.transpose(1, 2)  # (E, F, D): its rows are the columns of dA′
    w_tma, k_last = weight_layout(weight, chip)
    rows = rows_per_tile(num_rows, num_experts, dy.dtype)
    interleaved = activation in INTERLEAVED_ACTIVATIONS
    two_halves = activation in GATED_ACTIVATIONS and not interleaved
    product = "hidden_gradient_interleaved" if interleaved else "hidden_gradient"
    blocks = blocks_for(
        product, dy.dtype, rows, chip._replace(tma=w_tma), are_aligned(dy, weight, hidden)
    )
    num_blocks = cdiv(N, blocks.n)
    d_hidden = torch.empty_like(hidden) if want_hidden else None
    gated = hidden.new_empty(num_rows, N) if want_gated else None
    num_partials = num_blocks + (b_out is not None)
    partial = gates.new_empty(num_partials, num_rows) if want_gates else None
    block_c = blocks.n // blocks.split
    d_hidden_tma = output_box(
        d_hidden, 2 if two_halves else 1, blocks.m, 2 * block_c if interleaved else block_c, chip
    )  # fmt: skip
    gated_tma = output_box(gated, 1, blocks.m, block_c, chip)
    boxes = ((d_hidden, d_hidden_tma), (gated, gated_tma))
    store_tma = blocks.preload and all(out is None or tma is not None for out, tma in boxes)
    programs = tiles.shape[1] * num_blocks if num_rows else 0
    plan: dict[str, Any] = {
        "row_token": row_token, "offsets": offsets, "tiles": tiles, "num_tiles": tiles.shape[1],
        "num_rows": num_rows
    }  # fmt: skip
    launch(
        hidden_gradient_kernel, min(programs, chip.processors) if blocks.persistent else programs,
        blocks.warps, blocks.stages, dy=dy, w=weight_operand(weight, blocks, w_tma, k_last),
        gates=gates, hidden=hidden, d_hidden=d_hidden,
        d_hidden_tma=d_hidden_tma if store_tma else None,
        gated=gated, gated_tma=gated_tma if store_tma else None, partial=partial, row_slot=row_slot,
        **plan, num_blocks=num_blocks, num_experts=num_experts, top_k=gates.shape[1], N=N,
        K=K if want_gates or want_hidden else 0, dy_stride=dy.stride(0), we_stride=weight.stride(0),
        wn_stride=weight.stride(1), wk_stride=weight.stride(2), hidden_stride=hidden.shape[1],
        ACTIVATION=activation, GATED=two_halves, INTERLEAVED=interleaved, BLOCK_M=blocks.m,
        BLOCK_N=blocks.n, BLOCK_K=blocks.k, GROUP=blocks.group, SPLIT=blocks.split,
        PRELOAD=blocks.preload, W_TMA=w_tma, STORE_TMA=store_tma, K_LAST=k_last,
        EVEN=K % blocks.k == 0 and (w_tma or N % blocks.n == 0), PRECISION=precision,
    )  # fmt: skip
    if partial is None:
        return None, d_hidden, gated
    if b_out is not None:
        launch(
            bias_dot_kernel, tiles.shape[1] if num_rows else 0, dy=dy, bias=b_out.contiguous(),
            partial=partial[num_blocks:],
            **plan, num_experts=num_experts, K=K, dy_stride=dy.stride(0), BLOCK_M=blocks.m,
            BLOCK_K=DOT_COLUMNS,
        )  # fmt: skip
    d_gates = torch.empty_like(gates)
    launch(
        gate_gradient_kernel, cdiv(gates.numel(), 256), partial=partial, slot_row=slot_row,
        d_gates=d_gates,
        num_choices=gates.numel(), num_partials=num_partials, num_rows=num_rows, BLOCK=256,
    )  # fmt: skip
    return d_gates, d_hidden, gated
