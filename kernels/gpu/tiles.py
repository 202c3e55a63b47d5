"""Tiles of rows inside a kernel: which one a program owns, and how its results leave.

A tile is BLOCK_M rows of one expert (``dispatch.plan_tiles``); a program owns one block of columns
of it. Shape suffixes: M rows of a tile, C columns of a block or of a part of it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Plan(NamedTuple):
    """The rows of each expert, ``offsets`` (E + 1,), and the tiles (2, num_tiles) they are cut
    into: expert and first row of each. There are num_rows rows, dropped ones among them."""

    offsets: Any
    tiles: Any
    num_tiles: Any
    num_rows: Any
    num_experts: Any


class Tile(NamedTuple):
    """Rows of one expert. live_M: which of ``rows_M`` are the tile's; full: all are; kept: False
    for the rows of dropped choices, which belong to no expert."""

    expert: Any
    kept: Any
    first: Any
    rows_M: Any
    live_M: Any
    full: Any


class Matrix(NamedTuple):
    """Rows in memory. descriptor: TMA's, or None; stride: between rows; width: columns of one half,
    of which gate and up have one each."""

    pointer: Any
    descriptor: Any
    stride: Any
    width: Any


@triton.jit
def locate(program, num_tiles, num_blocks, GROUP: tl.constexpr):
    """Program → (tile, block of columns). GROUP tiles in a row take the same columns, whose weights
    are then in L2."""
    group = program // (GROUP * num_blocks)
    within = program % (GROUP * num_blocks)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def load_tile(plan, number, expert, BLOCK_M: tl.constexpr):
    """The tile of this number, which is one of ``expert``. Expert E holds the dropped rows, up to
    the last."""
    kept = expert < plan.num_experts
    first = tl.load(plan.tiles + plan.num_tiles + number)
    stop = tl.load(plan.offsets + expert + 1, mask=kept, other=0)
    stop = tl.where(kept, stop, plan.num_rows)
    rows_M = first + tl.arange(0, BLOCK_M)
    return Tile(expert, kept, first, rows_M, rows_M < stop, first + BLOCK_M <= stop)


@triton.jit
def store_rows(values_MC, out, tile, n0, half, TMA: tl.constexpr):
    """Columns n0 … of one half (0, or 1 for up's) of the tile's rows of ``out``, a ``Matrix``.

    TMA writes whole tiles only, for the next rows are another expert's. Each branch converts for
    itself: a conversion in front of both would serve the one that is not taken.
    """
    if TMA and tile.full:
        values_M1C = values_MC.reshape(values_MC.shape[0], 1, values_MC.shape[1])
        out.descriptor.store([tile.first, half, n0], values_M1C.to(out.pointer.dtype.element_ty))
    else:
        n_C = n0 + tl.arange(0, values_MC.shape[1])
        inside_MC = tile.live_M[:, None] & (n_C < out.width)[None, :]
        at_M1 = tile.rows_M.to(tl.int64)[:, None] * out.stride
        at_MC = at_M1 + (half * out.width + n_C)[None, :]
        tl.store(out.pointer + at_MC, values_MC.to(out.pointer.dtype.element_ty), mask=inside_MC)


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
