"""Rows sorted by expert times that expert's matrix: gather in the load, bias and activation in the
epilogue.

Shape suffixes: M rows of a tile, N columns of a block, C columns of a part of it; in the launcher
R rows, N columns, K terms of a product.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ironmoe.kernels.gpu.activations import Unit, unit, unit_of
from ironmoe.kernels.gpu.dispatch import plan_tiles
from ironmoe.kernels.gpu.launch import cdiv, launch
from ironmoe.kernels.gpu.operands import (
    are_aligned,
    output_box,
    takes_tma,
    weight_layout,
    weight_operand,
)
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


@triton.jit
def finish(
    acc_MC, up_MC, n0, bias, hidden, activated, tile,
    UNIT: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Bias and activation, in SPLIT parts; stores H, the activated units, or both.

    bias: of the tile's expert, or None. hidden, activated: a ``Matrix`` each, whose pointer is None
    where it is not wanted.
    """
    if SPLIT > 1:
        left, right = halves(acc_MC)
        up_left, up_right = halves(up_MC)
        n1 = n0 + right.shape[1]
        finish(
            left, up_left, n0, bias, hidden, activated,
            tile=tile, UNIT=UNIT, TMA=TMA, SPLIT=SPLIT // 2,
        )  # fmt: skip
        finish(
            right, up_right, n1, bias, hidden, activated,
            tile=tile, UNIT=UNIT, TMA=TMA, SPLIT=SPLIT // 2,
        )  # fmt: skip
    else:
        ACTIVATION: tl.constexpr = UNIT.activation
        if bias is not None:
            n_C = n0 + tl.arange(0, acc_MC.shape[1])
            inside_C = n_C < tl.where(tile.kept, hidden.width, 0)
            acc_MC += tl.load(bias + n_C, mask=inside_C, other=0.0).to(tl.float32)[None, :]
            if UNIT.gated:
                up_C = tl.load(bias + n_C + hidden.width, mask=inside_C, other=0.0)
                up_MC += up_C.to(tl.float32)[None, :]

        if hidden.pointer is not None:
            store_rows(acc_MC, hidden, tile, n0, 0, TMA)
            if UNIT.gated:
                store_rows(up_MC, hidden, tile, n0, 1, TMA)

        if activated.pointer is not None:
            if UNIT.interleaved:
                acc_MC, up_MC = neighbours(acc_MC)
                n0 = n0 // 2
            value_MC, _, _ = unit(acc_MC, up_MC, ACTIVATION)
            store_rows(value_MC, activated, tile, n0, 0, TMA)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "num_rows", "num_experts"])
def grouped_matmul_kernel(
    x, x_stride, row_token,                                  # rows: x[row_token], or x in order
    w, we_stride, wn_stride, wk_stride, bias, bias_stride,   # each expert's matrix and bias
    N, K,                                                    # columns of a half, terms
    hidden, hidden_tma, hidden_stride,                       # results: H
    activated, activated_tma, activated_stride,              # and the units
    offsets, tiles, num_tiles, num_rows, num_experts,        # which rows are whose: ``Plan``
    num_blocks,                                              # of columns
    UNIT: tl.constexpr, BLOCKS: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads x, the weights and ``row_token``; writes H and/or the activated units. Dropped rows
    become 0.

    A gated unit: H is (R, 2N), the units are (R, N), and a program has N columns of gate and of up.
    Interleaved: gate and up in turns are N columns, and the units are (R, N / 2).
    """
    BLOCK_N: tl.constexpr = BLOCKS.n
    plan = Plan(offsets, tiles, num_tiles, num_rows, num_experts)
    weights = Weights(w, we_stride, wn_stride, wk_stride, N)
    h = Matrix(hidden, hidden_tma, hidden_stride, N)
    units = Matrix(activated, activated_tma, activated_stride, N // 2 if UNIT.interleaved else N)

    for program in range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        number, block = locate(program, num_tiles, num_blocks, BLOCKS.group)
        expert = tl.load(tiles + number)
        if expert >= 0:
            tile = load_tile(plan, number, expert, BLOCKS.m)
            source_M = tile.rows_M
            if row_token is not None:
                source_M = tl.load(row_token + tile.rows_M, mask=tile.live_M, other=0)
            source = Source(x, x_stride, source_M)
            n0 = block * BLOCK_N
            terms = tl.where(tile.kept, K, 0)
            acc_MN, up_MN = accumulate(
                source, weights, tile, n0, terms,
                GATED=UNIT.gated, BLOCKS=BLOCKS, ACCESS=ACCESS, PRECISION=PRECISION,
            )  # fmt: skip
            own_bias = bias if bias is None else bias + expert.to(tl.int64) * bias_stride
            finish(
                acc_MN, up_MN, n0, own_bias, h, units,
                tile=tile, UNIT=UNIT, TMA=ACCESS.store_tma, SPLIT=BLOCKS.split,
            )  # fmt: skip


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    tiles: Tensor | None,
    *,
    row_token: Tensor | None = None,
    activation: str = "none",
    keep_hidden: bool = True,
    precision: str,
) -> tuple[Tensor | None, Tensor | None]:
    """(H or None, activated units or None): see
    ``ironmoe.kernels.grouped_matmul.grouped_matmul_op``."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    num_experts, wide, K = weight.shape
    num_rows = len(x) if row_token is None else len(row_token)
    if tiles is None:
        tiles = plan_tiles(offsets, num_rows, x.dtype)
    kind = unit_of(activation)
    N = wide // kind.halves
    units = N // 2 if kind.interleaved else N
    hidden = x.new_empty(num_rows, wide) if keep_hidden else None
    activated = x.new_empty(num_rows, units) if activation != "none" else None

    chip = chip_of(x)
    w_tma, k_last = weight_layout(weight, chip)
    rows = rows_per_tile(num_rows, num_experts, x.dtype)
    known = chip._replace(tma=w_tma)
    blocks = blocks_for(_product(kind), x.dtype, rows, known, are_aligned(x, weight))
    box = kind.gated and w_tma and blocks.box
    block_c = blocks.n // blocks.split
    hidden_tma = output_box(hidden, kind.halves, blocks.m, block_c, chip)
    units_c = block_c // 2 if kind.interleaved else block_c
    activated_tma = output_box(activated, 1, blocks.m, units_c, chip)
    access = Access(
        x_tma=chip.tma and row_token is None and takes_tma(x),
        w_tma=w_tma,
        store_tma=all(
            out is None or tma is not None
            for out, tma in ((hidden, hidden_tma), (activated, activated_tma))
        ),
        k_last=k_last,
        box=box,
        even=K % blocks.k == 0 and (w_tma or N % blocks.n == 0),
    )

    num_blocks = cdiv(N, blocks.n)
    programs = tiles.shape[1] * num_blocks if num_rows else 0
    launch(
        grouped_matmul_kernel,
        min(programs, chip.processors) if blocks.persistent else programs,
        blocks.warps,
        blocks.stages,
        x=TensorDescriptor.from_tensor(x, [blocks.m, blocks.k]) if access.x_tma else x,
        x_stride=x.stride(0),
        row_token=row_token,
        w=weight_operand(weight, blocks, w_tma, k_last, box=box),
        we_stride=weight.stride(0),
        wn_stride=weight.stride(1),
        wk_stride=weight.stride(2),
        bias=bias,
        bias_stride=wide,
        N=N,
        K=K,
        hidden=hidden,
        hidden_tma=hidden_tma if access.store_tma else None,
        hidden_stride=wide,
        activated=activated,
        activated_tma=activated_tma if access.store_tma else None,
        activated_stride=units,
        offsets=offsets,
        tiles=tiles,
        num_tiles=tiles.shape[1],
        num_rows=num_rows,
        num_experts=num_experts,
        num_blocks=num_blocks,
        UNIT=kind,
        BLOCKS=blocks,
        ACCESS=access,
        PRECISION=precision,
    )
    return hidden, activated


def _product(kind: Unit) -> str:
    """The name of the product in the table of block sizes."""
    if kind.interleaved:
        return "interleaved"
    if kind.gated:
        return "gated"
    return "plain" if kind.activation == "none" else "activated"
