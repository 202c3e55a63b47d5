"""Rows sorted by expert times that expert's matrix: gather in the load, bias and activation in the
epilogue.

A program owns one block of columns of one tile; a tile is BLOCK_M rows of one expert
(``dispatch.plan_tiles``). Weights come
through a TMA descriptor where the chip has one: that frees the registers of their pointers, which
with two accumulators is the difference between spilling and not (docs/kernels.md).
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ironmoe.kernels.activations import GATED_ACTIVATIONS, INTERLEAVED_ACTIVATIONS
from ironmoe.kernels.gpu.activations import unit
from ironmoe.kernels.gpu.launch import cdiv, launch
from ironmoe.kernels.tuning import Blocks, Chip, blocks_for, chip_of, rows_per_tile


@triton.jit
def locate(program, num_tiles, num_blocks, GROUP: tl.constexpr):
    """Program → (tile, block of columns). GROUP tiles in a row take the same columns, whose weights
    are then in L2."""
    group = program // (GROUP * num_blocks)
    within = program % (GROUP * num_blocks)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def accumulate(
    x, w, rows_M, live_M, first, expert, n0, up_shift, N, K, x_stride, we_stride, wn_stride,
    wk_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, K_LAST: tl.constexpr, GATED: tl.constexpr,
    BOX: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[rows] @ w[expert]ᵀ in float32: columns n0 …, and for GATED those ``up_shift`` further on.

    With BOX both are one product of twice the columns, whose weights TMA brings in one box.
    """
    WIDE: tl.constexpr = 2 * BLOCK_N if BOX else BLOCK_N
    acc_MW = tl.zeros((BLOCK_M, WIDE), tl.float32)
    up_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if GATED and not BOX else acc_MW
    k_K = tl.arange(0, BLOCK_K)
    n_N = n0 + tl.arange(0, BLOCK_N)
    if not X_TMA:
        x_MK = x + rows_M.to(tl.int64)[:, None] * x_stride + k_K[None, :]
    if not W_TMA:
        w_N = w + expert.to(tl.int64) * we_stride + n_N.to(tl.int64) * wn_stride
        w_KN = w_N[None, :] + k_K[:, None].to(tl.int64) * wk_stride

    for k in tl.range(0, K, BLOCK_K):
        if X_TMA:
            a_MK = x.load([first, k])
        elif EVEN:
            a_MK = tl.load(x_MK + k, mask=live_M[:, None], other=0.0)
        else:
            a_MK = tl.load(x_MK + k, mask=live_M[:, None] & ((k + k_K)[None, :] < K), other=0.0)

        if W_TMA:
            b_KW = load_box(w, expert, n0, k, WIDE, BLOCK_K, K_LAST, BOX)
        elif EVEN:
            b_KW = tl.load(w_KN + k * wk_stride)
        else:
            inside_KN = ((k + k_K)[:, None] < K) & (n_N[None, :] < N)
            b_KW = tl.load(w_KN + k * wk_stride, mask=inside_KN, other=0.0)
        acc_MW = tl.dot(a_MK, b_KW, acc_MW, input_precision=PRECISION)

        if GATED and not BOX:
            if W_TMA:
                b_KN = load_box(w, expert, up_shift + n0, k, BLOCK_N, BLOCK_K, K_LAST, False)
            elif EVEN:
                b_KN = tl.load(w_KN + k * wk_stride + up_shift * wn_stride)
            else:
                up_KN = w_KN + k * wk_stride + up_shift * wn_stride
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


@triton.jit
def halves(acc_MN):
    """The left and the right half of the columns: an epilogue works on one at a time, to need fewer
    registers."""
    M: tl.constexpr = acc_MN.shape[0]
    HALF: tl.constexpr = acc_MN.shape[1] // 2
    return acc_MN.reshape(M, 2, HALF).permute(0, 2, 1).split()


@triton.jit
def neighbours(values_MC):
    """The even and the odd columns. A thread of a product holds pairs of columns, so nothing moves
    between threads."""
    return values_MC.reshape(values_MC.shape[0], values_MC.shape[1] // 2, 2).split()


@triton.jit
def store_rows(
    values_MC, out, out_tma, rows_M, live_M, first, n0, half, N, out_stride, full, TMA: tl.constexpr
):  # fmt: skip
    """Columns n0 … of one half (0, or 1 for up's) of the tile's rows.

    TMA writes whole tiles only, for the next rows are another expert's. Each branch converts for
    itself: a conversion in front of both would serve the one that is not taken.
    """
    if TMA and full:
        values_M1C = values_MC.reshape(values_MC.shape[0], 1, values_MC.shape[1])
        out_tma.store([first, half, n0], values_M1C.to(out.dtype.element_ty))
    else:
        n_C = n0 + tl.arange(0, values_MC.shape[1])
        inside_MC = live_M[:, None] & (n_C < N)[None, :]
        at_MC = rows_M.to(tl.int64)[:, None] * out_stride + (half * N + n_C)[None, :]
        tl.store(out + at_MC, values_MC.to(out.dtype.element_ty), mask=inside_MC)


@triton.jit
def finish(
    acc_MC, up_MC, n0, bias, hidden, hidden_tma, activated, activated_tma, rows_M, live_M, first,
    full, expert, num_experts,
    N, bias_stride, hidden_stride, activated_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    STORE_TMA: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Bias and activation, in SPLIT parts; stores H, the activated units, or both."""
    if SPLIT > 1:
        left, right = halves(acc_MC)
        up_left, up_right = halves(up_MC)
        finish(
            left, up_left, n0, bias, hidden, hidden_tma, activated, activated_tma, rows_M, live_M,
            first, full, expert,
            num_experts, N, bias_stride, hidden_stride, activated_stride, ACTIVATION, GATED,
            INTERLEAVED, STORE_TMA, SPLIT // 2,
        )  # fmt: skip
        finish(
            right, up_right, n0 + right.shape[1], bias, hidden, hidden_tma, activated,
            activated_tma, rows_M, live_M, first, full,
            expert, num_experts, N, bias_stride, hidden_stride, activated_stride, ACTIVATION, GATED,
            INTERLEAVED, STORE_TMA,
            SPLIT // 2,
        )  # fmt: skip
    else:
        n_C = n0 + tl.arange(0, acc_MC.shape[1])
        if bias is not None:
            bias_C = bias + expert.to(tl.int64) * bias_stride + n_C
            inside_C = n_C < tl.where(expert < num_experts, N, 0)
            acc_MC += tl.load(bias_C, mask=inside_C, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up_MC += tl.load(bias_C + N, mask=inside_C, other=0.0).to(tl.float32)[None, :]
        if hidden is not None:
            store_rows(
                acc_MC,
                hidden,
                hidden_tma,
                rows_M,
                live_M,
                first,
                n0,
                0,
                N,
                hidden_stride,
                full,
                STORE_TMA,
            )
            if GATED:
                store_rows(
                    up_MC,
                    hidden,
                    hidden_tma,
                    rows_M,
                    live_M,
                    first,
                    n0,
                    1,
                    N,
                    hidden_stride,
                    full,
                    STORE_TMA,
                )
        if activated is not None:
            if INTERLEAVED:
                acc_MC, up_MC = neighbours(acc_MC)
                n0, N = n0 // 2, N // 2
            value_MC, _, _ = unit(acc_MC, up_MC, ACTIVATION)
            store_rows(
                value_MC,
                activated,
                activated_tma,
                rows_M,
                live_M,
                first,
                n0,
                0,
                N,
                activated_stride,
                full,
                STORE_TMA,
            )


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "num_rows", "num_experts"])
def grouped_matmul_kernel(
    x, w, bias, hidden, hidden_tma, activated, activated_tma, row_token, offsets, tiles, num_tiles,
    num_blocks, num_rows,
    num_experts, N, K, x_stride, we_stride, wn_stride, wk_stride, bias_stride, hidden_stride,
    activated_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    STORE_TMA: tl.constexpr, K_LAST: tl.constexpr, BOX: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads x, the weights and ``row_token``; writes H and/or the activated units. Dropped rows
    become 0.

    GATED: H is (R, 2N), the units are (R, N), and a program has N columns of gate and of up.
    INTERLEAVED: gate and up in turns are N columns, and the units are (R, N / 2).
    """
    for program in range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        tile, block = locate(program, num_tiles, num_blocks, GROUP)
        expert = tl.load(tiles + tile)
        if expert >= 0:
            first, rows_M, live_M, full = tile_rows(
                tiles, tile, num_tiles, offsets, expert, num_experts, num_rows, BLOCK_M
            )
            source_M = (
                rows_M if row_token is None else tl.load(row_token + rows_M, mask=live_M, other=0)
            )
            n0 = block * BLOCK_N
            acc_MN, up_MN = accumulate(
                x, w, source_M, live_M, first, expert, n0, N, N,
                tl.where(expert < num_experts, K, 0),
                x_stride, we_stride, wn_stride, wk_stride,
                BLOCK_M, BLOCK_N, BLOCK_K, X_TMA, W_TMA, K_LAST, GATED, BOX, EVEN, PRECISION,
            )  # fmt: skip
            finish(
                acc_MN, up_MN, n0, bias, hidden, hidden_tma, activated, activated_tma, rows_M,
                live_M, first, full, expert,
                num_experts, N, bias_stride, hidden_stride, activated_stride, ACTIVATION, GATED,
                INTERLEAVED, STORE_TMA, SPLIT,
            )  # fmt: skip


@triton.jit
def tile_rows(
    tiles, tile, num_tiles, offsets, expert, num_experts, num_rows, BLOCK_M: tl.constexpr
):
    """(first row, rows, which of them are this tile's, whether all are). Expert E holds the dropped
    rows, up to the last."""
    first = tl.load(tiles + num_tiles + tile)
    stop = tl.load(offsets + expert + 1, mask=expert < num_experts, other=0)
    stop = tl.where(expert < num_experts, stop, num_rows)
    rows_M = first + tl.arange(0, BLOCK_M)
    return first, rows_M, rows_M < stop, first + BLOCK_M <= stop


def grouped_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, tiles: Tensor,
    row_token: Tensor | None,
    activation: str, keep_hidden: bool, precision: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(H or None, activated units or None): see
    ``ironmoe.kernels.grouped_matmul.grouped_matmul_op``."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    gated, interleaved = activation in GATED_ACTIVATIONS, activation in INTERLEAVED_ACTIVATIONS
    num_experts, wide, K = weight.shape
    units = wide // 2 if gated else wide
    N = wide if interleaved else units
    num_rows = len(x) if row_token is None else len(row_token)
    chip = chip_of(x)
    product = (
        "plain"
        if activation == "none"
        else "interleaved"
        if interleaved
        else "gated"
        if gated
        else "activated"
    )
    w_tma, k_last = weight_layout(weight, chip)
    rows = rows_per_tile(num_rows, num_experts, x.dtype)
    blocks = blocks_for(product, x.dtype, rows, chip._replace(tma=w_tma), are_aligned(x, weight))
    hidden = x.new_empty(num_rows, wide) if keep_hidden else None
    activated = x.new_empty(num_rows, units) if activation != "none" else None

    box = product == "gated" and w_tma and blocks.box
    block_c = blocks.n // blocks.split
    hidden_tma = output_box(hidden, 2 if product == "gated" else 1, blocks.m, block_c, chip)
    activated_tma = output_box(
        activated, 1, blocks.m, block_c // 2 if interleaved else block_c, chip
    )
    boxes = ((hidden, hidden_tma), (activated, activated_tma))
    store_tma = all(out is None or tma is not None for out, tma in boxes)
    x_tma = chip.tma and row_token is None and takes_tma(x)
    num_blocks = cdiv(N, blocks.n)
    programs = tiles.shape[1] * num_blocks if num_rows else 0
    launch(
        grouped_matmul_kernel, min(programs, chip.processors) if blocks.persistent else programs,
        blocks.warps, blocks.stages,
        x=TensorDescriptor.from_tensor(x, [blocks.m, blocks.k]) if x_tma else x,
        w=weight_operand(weight, blocks, w_tma, k_last, box=box), bias=bias,
        hidden=hidden, hidden_tma=hidden_tma if store_tma else None,
        activated=activated, activated_tma=activated_tma if store_tma else None,
        row_token=row_token, offsets=offsets, tiles=tiles, num_tiles=tiles.shape[1],
        num_blocks=num_blocks, num_rows=num_rows,
        num_experts=num_experts, N=N, K=K, x_stride=x.stride(0), we_stride=weight.stride(0),
        wn_stride=weight.stride(1),
        wk_stride=weight.stride(2), bias_stride=wide, hidden_stride=wide, activated_stride=units,
        ACTIVATION=activation, GATED=product == "gated", INTERLEAVED=interleaved, BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k, GROUP=blocks.group, SPLIT=blocks.split, X_TMA=x_tma, W_TMA=w_tma,
        STORE_TMA=store_tma, K_LAST=k_last,
        BOX=box, EVEN=K % blocks.k == 0 and (w_tma or N % blocks.n == 0), PRECISION=precision,
    )  # fmt: skip
    return hidden, activated


def weight_layout(weight: Tensor, chip: Chip) -> tuple[bool, bool]:
    """(does TMA read them, is K their last axis) for stacked weights (E, N, K) of any strides."""
    k_last = weight.stride(2) == 1
    return chip.tma and takes_tma(weight if k_last else weight.transpose(1, 2)), k_last


def weight_operand(
    weight: Tensor, blocks: Blocks, tma: bool, k_last: bool, *, box: bool = False
) -> Tensor | TensorDescriptor:
    """What the kernel reads. ``box``: the same columns of gate and of up are one box."""
    if not tma:
        return weight
    if box:
        halves_EHNK = weight.unflatten(1, (2, weight.shape[1] // 2))
        if k_last:
            return TensorDescriptor.from_tensor(halves_EHNK, [1, 2, blocks.n, blocks.k])
        return TensorDescriptor.from_tensor(
            halves_EHNK.permute(0, 3, 1, 2), [1, blocks.k, 2, blocks.n]
        )
    if k_last:
        return TensorDescriptor.from_tensor(weight, [1, blocks.n, blocks.k])
    return TensorDescriptor.from_tensor(weight.transpose(1, 2), [1, blocks.k, blocks.n])


def are_aligned(*tensors: Tensor) -> bool:
    """Whether Triton knows that a row starts at an address wide loads can take: it asks for strides
    that are multiples of 16."""
    return all(stride == 1 or stride % 16 == 0 for tensor in tensors for stride in tensor.stride())


def takes_tma(tensor: Tensor) -> bool:
    """Whether the copy engine can address it: 16-byte rows, a contiguous last axis, no empty or
    zero-stride one."""
    aligned = all(
        stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1]
    )
    return aligned and tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0


def output_box(
    out: Tensor | None, num_halves: int, rows: int, columns: int, chip: Chip
) -> TensorDescriptor | None:  # fmt: skip
    """``rows`` × ``columns`` of one half of ``out`` (R, num_halves · N). No box reaches beyond its
    half.

    None where TMA does not take ``out``.
    """
    if out is None or not chip.tma:
        return None
    out_RHN = out.unflatten(1, (num_halves, out.shape[1] // num_halves))
    return TensorDescriptor.from_tensor(out_RHN, [rows, 1, columns]) if takes_tma(out_RHN) else None
