"""The backward of activation, gate and second layer in one pass: dH, the gate gradient, and the
gated units for dW₂.

dA′ = dO W₂ before gating, so that ⟨dA′, A⟩ is the gate's gradient and a gate of 0 is exact
(SonicMoE, arXiv 2512.14080). Neither the second layer's output nor its gradient ever exists.
Partial dot products of the blocks of columns are stored and added in order by
``gate_gradient_kernel``: no atomics.

Shape suffixes: M rows of a tile, N columns of a block (of F), C columns of a part of it, W columns
of H that belong to them, K terms (of D).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ironmoe.kernels.gpu.activations import unit, unit_of
from ironmoe.kernels.gpu.dispatch import plan_tiles
from ironmoe.kernels.gpu.launch import cdiv, launch
from ironmoe.kernels.gpu.operands import are_aligned, output_box, weight_layout, weight_operand
from ironmoe.kernels.gpu.product import Access, Source, Weights, accumulate
from ironmoe.kernels.gpu.tiles import (
    Matrix,
    Plan,
    halves,
    load_tile,
    locate,
    neighbours,
    store_rows,
)
from ironmoe.kernels.tuning import blocks_for, chip_of, rows_per_tile
from ironmoe.kernels.types import Dispatch

DOT_COLUMNS = 32


@triton.jit
def load_hidden(hidden, tile, n0, BLOCK_N: tl.constexpr, UNIT: tl.constexpr):
    """BLOCK_N columns of H: (gate or the only half, up). Interleaved, both are one block that is
    twice as wide."""
    WIDE: tl.constexpr = 2 * BLOCK_N if UNIT.interleaved else BLOCK_N
    n_W = n0 * (WIDE // BLOCK_N) + tl.arange(0, WIDE)
    at_MW = tile.rows_M.to(tl.int64)[:, None] * hidden.stride + n_W[None, :]
    inside_MW = tile.live_M[:, None] & (n_W < hidden.width)[None, :]
    h_MW = tl.load(hidden.pointer + at_MW, mask=inside_MW, other=0.0)
    up_MW = h_MW
    if UNIT.gated:
        up_MW = tl.load(hidden.pointer + at_MW + hidden.width, mask=inside_MW, other=0.0)
    return h_MW, up_MW


@triton.jit
def through_unit(
    acc_MC, h_MW, up_MW, n0, gate_M, hidden, d_hidden, gated, tile,
    UNIT: tl.constexpr, PRELOAD: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Some columns of dA′ through the activation, in SPLIT parts; returns their ⟨dA′, A⟩ (M,).

    hidden, d_hidden, gated: a ``Matrix`` each; the pointer of one that is not wanted is None.
    """
    if SPLIT > 1:
        left, right = halves(acc_MC)
        h_left, h_right = halves(h_MW) if PRELOAD else (left, right)
        up_left, up_right = halves(up_MW) if PRELOAD else (left, right)
        dot_left_M = through_unit(
            left, h_left, up_left, n0, gate_M,
            hidden=hidden, d_hidden=d_hidden, gated=gated, tile=tile,
            UNIT=UNIT, PRELOAD=PRELOAD, TMA=TMA, SPLIT=SPLIT // 2,
        )  # fmt: skip
        dot_right_M = through_unit(
            right, h_right, up_right, n0 + right.shape[1], gate_M,
            hidden=hidden, d_hidden=d_hidden, gated=gated, tile=tile,
            UNIT=UNIT, PRELOAD=PRELOAD, TMA=TMA, SPLIT=SPLIT // 2,
        )  # fmt: skip
        return dot_left_M + dot_right_M
    else:
        ACTIVATION: tl.constexpr = UNIT.activation
        if not PRELOAD:
            C: tl.constexpr = acc_MC.shape[1]
            h_MW, up_MW = load_hidden(hidden, tile, n0, C, UNIT)
        h_MC, up_MC = neighbours(h_MW) if UNIT.interleaved else (h_MW, up_MW)
        h_MC, up_MC = h_MC.to(tl.float32), up_MC.to(tl.float32)
        value_MC, slope_MC, up_slope_MC = unit(h_MC, up_MC, ACTIVATION)

        if PRELOAD:
            # Rows that are not the tile's have a dA′ of 0 and no result. A value that hangs on dA′
            # is computed once, in the layout of dA′; without this the compiler computes it from H
            # a second time, in the layout of the stores.
            value_MC = tl.where(tile.live_M[:, None], value_MC, acc_MC)

        if gated.pointer is not None:
            store_rows(value_MC * gate_M[:, None], gated, tile, n0, 0, TMA)
        if d_hidden.pointer is not None:
            d_value_MC = acc_MC * gate_M[:, None]
            d_h_MC, d_up_MC = d_value_MC * slope_MC, d_value_MC * up_slope_MC
            if UNIT.interleaved:
                d_MW = tl.join(d_h_MC, d_up_MC).reshape(acc_MC.shape[0], 2 * acc_MC.shape[1])
                store_rows(d_MW, d_hidden, tile, 2 * n0, 0, TMA)
            else:
                store_rows(d_h_MC, d_hidden, tile, n0, 0, TMA)
                if UNIT.gated:
                    store_rows(d_up_MC, d_hidden, tile, n0, 1, TMA)

        n_C = n0 + tl.arange(0, acc_MC.shape[1])
        inside_MC = tile.live_M[:, None] & (n_C < gated.width)[None, :]
        return tl.sum(tl.where(inside_MC, acc_MC * value_MC, 0.0), 1)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "num_rows", "num_experts", "top_k"])
def hidden_gradient_kernel(
    dy, dy_stride, row_token, row_slot,                # rows: dy[row_token]
    w, we_stride, wn_stride, wk_stride,                # W₂ of each expert, as (F, D)
    N, K,                                              # F and D
    gates, top_k,                                      # (T, K)
    hidden, hidden_stride,                             # H
    d_hidden, d_hidden_tma, gated, gated_tma, partial, # results; those not wanted are None
    offsets, tiles, num_tiles, num_rows, num_experts,  # which rows are whose: ``Plan``
    num_blocks,                                        # of columns
    UNIT: tl.constexpr, BLOCKS: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads dO through ``row_token``, W₂ and H. Writes dH (R, N | 2N), gated units (R, N) and
    partial dots (blocks, R), those that are given.

    ``BLOCKS.preload`` asks for H before the product, which then hides the way from memory.
    """
    BLOCK_N: tl.constexpr = BLOCKS.n
    PRELOAD: tl.constexpr = BLOCKS.preload
    plan = Plan(offsets, tiles, num_tiles, num_rows, num_experts)
    weights = Weights(w, we_stride, wn_stride, wk_stride, N)
    wide = 2 * N if UNIT.interleaved else N
    h = Matrix(hidden, None, hidden_stride, wide)
    d_h = Matrix(d_hidden, d_hidden_tma, hidden_stride, wide)
    units = Matrix(gated, gated_tma, N, N)

    for program in range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        number, block = locate(program, num_tiles, num_blocks, BLOCKS.group)
        expert = tl.load(tiles + number)
        if expert >= 0:
            tile = load_tile(plan, number, expert, BLOCKS.m)
            token_M = tl.load(row_token + tile.rows_M, mask=tile.live_M, other=0)
            kept_M = tile.live_M & (tile.rows_M < tl.where(tile.kept, num_rows, 0))
            slot_M = tl.load(row_slot + tile.rows_M, mask=tile.live_M, other=0)
            gate_M = tl.load(gates + token_M.to(tl.int64) * top_k + slot_M, mask=kept_M, other=0.0)
            n0 = block * BLOCK_N

            h_MW, up_MW = gate_M, gate_M  # without PRELOAD nothing reads them; they need a value
            if PRELOAD:
                h_MW, up_MW = load_hidden(h, tile, n0, BLOCK_N, UNIT)
            source = Source(dy, dy_stride, token_M)
            terms = tl.where(tile.kept, K, 0)
            acc_MN, _ = accumulate(
                source, weights, tile, n0, terms,
                GATED=False, BLOCKS=BLOCKS, ACCESS=ACCESS, PRECISION=PRECISION,
            )  # fmt: skip
            dot_M = through_unit(
                acc_MN, h_MW, up_MW, n0, gate_M,
                hidden=h, d_hidden=d_h, gated=units, tile=tile,
                UNIT=UNIT, PRELOAD=PRELOAD, TMA=ACCESS.store_tma, SPLIT=BLOCKS.split,
            )  # fmt: skip
            if partial is not None:
                at_M = partial + block.to(tl.int64) * num_rows + tile.rows_M
                tl.store(at_M, dot_M, mask=tile.live_M)


@triton.jit(do_not_specialize=["num_tiles", "num_rows", "num_experts"])
def bias_dot_kernel(
    dy, bias, partial, row_token, offsets, tiles, num_tiles, num_rows, num_experts, K, dy_stride,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[r] = ⟨dO of the row's token, b₂ of its expert⟩."""
    plan = Plan(offsets, tiles, num_tiles, num_rows, num_experts)
    number = tl.program_id(0)
    expert = tl.load(tiles + number)
    if expert >= 0:
        tile = load_tile(plan, number, expert, BLOCK_M)
        token_M = tl.load(row_token + tile.rows_M, mask=tile.live_M, other=0)
        dot_MK = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for k in tl.range(0, tl.where(tile.kept, K, 0), BLOCK_K):
            k_K = k + tl.arange(0, BLOCK_K)
            at_MK = token_M.to(tl.int64)[:, None] * dy_stride + k_K[None, :]
            inside_MK = tile.live_M[:, None] & (k_K < K)[None, :]
            dy_MK = tl.load(dy + at_MK, mask=inside_MK, other=0.0).to(tl.float32)
            bias_K = tl.load(bias + expert.to(tl.int64) * K + k_K, mask=k_K < K, other=0.0)
            dot_MK += dy_MK * bias_K.to(tl.float32)[None, :]
        tl.store(partial + tile.rows_M, tl.sum(dot_MK, 1), mask=tile.live_M)


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
    dy: Tensor,
    gates: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    hidden: Tensor,
    dispatch: Dispatch,
    *,
    tiles: Tensor | None,
    activation: str,
    precision: str,
    want_gates: bool,
    want_hidden: bool,
    want_gated: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d_gates (T, K) float32, dH like H, gated units (R, F)), each None if not wanted. The gated
    units alone, which dW₂ needs, cost no product."""
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    gates = gates.to(torch.float32).contiguous()
    num_experts, K, N = w_out.shape
    num_rows = len(dispatch.row_token)
    if tiles is None:
        tiles = plan_tiles(dispatch.offsets, num_rows, dy.dtype)
    weight = w_out.transpose(1, 2)  # (E, F, D): its rows are the columns of dA′
    kind = unit_of(activation)
    product = "hidden_gradient_interleaved" if kind.interleaved else "hidden_gradient"

    chip = chip_of(dy)
    w_tma, k_last = weight_layout(weight, chip)
    rows = rows_per_tile(num_rows, num_experts, dy.dtype)
    known = chip._replace(tma=w_tma)
    blocks = blocks_for(product, dy.dtype, rows, known, are_aligned(dy, weight, hidden))
    num_blocks = cdiv(N, blocks.n)

    d_hidden = torch.empty_like(hidden) if want_hidden else None
    gated = hidden.new_empty(num_rows, N) if want_gated else None
    num_partials = num_blocks + (b_out is not None)
    partial = gates.new_empty(num_partials, num_rows) if want_gates else None
    block_c = blocks.n // blocks.split
    wide_c = 2 * block_c if kind.interleaved else block_c
    d_hidden_tma = output_box(d_hidden, kind.halves, blocks.m, wide_c, chip)
    gated_tma = output_box(gated, 1, blocks.m, block_c, chip)
    boxes = ((d_hidden, d_hidden_tma), (gated, gated_tma))
    access = Access(
        x_tma=False,
        w_tma=w_tma,
        store_tma=blocks.preload and all(out is None or tma is not None for out, tma in boxes),
        k_last=k_last,
        box=False,
        even=K % blocks.k == 0 and (w_tma or N % blocks.n == 0),
    )

    plan: dict[str, Any] = {
        "offsets": dispatch.offsets,
        "tiles": tiles,
        "num_tiles": tiles.shape[1],
        "num_rows": num_rows,
        "num_experts": num_experts,
    }
    programs = tiles.shape[1] * num_blocks if num_rows else 0
    launch(
        hidden_gradient_kernel,
        min(programs, chip.processors) if blocks.persistent else programs,
        blocks.warps,
        blocks.stages,
        dy=dy,
        dy_stride=dy.stride(0),
        row_token=dispatch.row_token,
        row_slot=dispatch.row_slot,
        w=weight_operand(weight, blocks, w_tma, k_last),
        we_stride=weight.stride(0),
        wn_stride=weight.stride(1),
        wk_stride=weight.stride(2),
        N=N,
        K=K if want_gates or want_hidden else 0,
        gates=gates,
        top_k=gates.shape[1],
        hidden=hidden,
        hidden_stride=hidden.shape[1],
        d_hidden=d_hidden,
        d_hidden_tma=d_hidden_tma if access.store_tma else None,
        gated=gated,
        gated_tma=gated_tma if access.store_tma else None,
        partial=partial,
        **plan,
        num_blocks=num_blocks,
        UNIT=kind,
        BLOCKS=blocks,
        ACCESS=access,
        PRECISION=precision,
    )
    if partial is None:
        return None, d_hidden, gated

    if b_out is not None:
        launch(
            bias_dot_kernel,
            tiles.shape[1] if num_rows else 0,
            dy=dy,
            bias=b_out.contiguous(),
            partial=partial[num_blocks:],
            row_token=dispatch.row_token,
            **plan,
            K=K,
            dy_stride=dy.stride(0),
            BLOCK_M=blocks.m,
            BLOCK_K=DOT_COLUMNS,
        )
    d_gates = torch.empty_like(gates)
    launch(
        gate_gradient_kernel,
        cdiv(gates.numel(), 256),
        partial=partial,
        slot_row=dispatch.slot_row,
        d_gates=d_gates,
        num_choices=gates.numel(),
        num_partials=num_partials,
        num_rows=num_rows,
        BLOCK=256,
    )
    return d_gates, d_hidden, gated
