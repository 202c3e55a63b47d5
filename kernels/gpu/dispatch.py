"""Counting sort of the choices by expert, and the map from tiles to experts. The host waits for
nothing, and positions do not depend on timing.

Choices are cut into segments. Each segment counts its choices per expert; a scan turns the counts
into the first row of every (segment, expert); each segment then places its choices in order, and
the tiles are written by the same programs. Expert E holds the dropped choices and comes last.

Shape suffixes: B choices of a block, E experts (with the dropped ones, padded), S segments, M tiles
written at once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ironmoe.kernels.gpu.launch import cdiv, launch, next_power_of_2
from ironmoe.kernels.tuning import max_tiles, rows_per_tile

BLOCK = 32  # choices ranked at once, each against all others
COUNTED = 128  # choices counted at once
MAX_SEGMENTS = 1024


@triton.jit
def load_choices(experts, i_B, stop, num_experts):
    """The expert of each choice. One outside 0 … E − 1 counts as dropped, so that no row is ever
    out of range."""
    expert_B = tl.load(experts + i_B, mask=i_B < stop, other=0)
    return tl.where(
        (i_B < stop) & (expert_B >= 0) & (expert_B < num_experts),
        expert_B.to(tl.int32),
        num_experts,
    )


@triton.jit(do_not_specialize=["num_choices", "segment_length", "num_experts", "num_segments"])
def count_kernel(
    experts,
    counts,
    num_choices,
    segment_length,
    num_segments,
    num_experts,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """counts[e, segment]: how many of the segment's choices take expert e."""
    segment = tl.program_id(0)
    start = segment * segment_length
    stop = tl.minimum(start + segment_length, num_choices)

    total_E = tl.zeros((BINS,), tl.int32)
    for first in range(start, stop, BLOCK):
        i_B = first + tl.arange(0, BLOCK)
        expert_B = load_choices(experts, i_B, stop, num_experts)
        total_E += tl.histogram(expert_B, BINS, mask=i_B < stop)

    e_E = tl.arange(0, BINS)
    tl.store(counts + e_E * num_segments + segment, total_E, mask=e_E <= num_experts)


@triton.jit(do_not_specialize=["num_segments"])
def scan_kernel(counts, totals, num_segments, SEGMENTS: tl.constexpr):
    """Replaces each count of an expert by the sum of its counts in earlier segments; also stores
    the sum of all."""
    expert = tl.program_id(0)
    s_S = tl.arange(0, SEGMENTS)
    at_S = counts + expert * num_segments + s_S
    count_S = tl.load(at_S, mask=s_S < num_segments, other=0)
    tl.store(at_S, tl.cumsum(count_S, 0) - count_S, mask=s_S < num_segments)
    tl.store(totals + expert, tl.sum(count_S, 0))


@triton.jit(
    do_not_specialize=["num_choices", "segment_length", "num_segments", "num_experts", "num_tiles"],
)
def place_kernel(
    experts,
    counts,
    totals,
    offsets,
    row_token,
    row_slot,
    slot_row,
    tiles,
    num_choices,
    segment_length,
    num_segments,
    num_experts,
    num_tiles,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Gives every choice its row: the first row of its expert, plus the number of choices of the
    same expert in earlier segments, plus their number before it in this segment.

    Where tiles are asked for, program e writes those of expert e as well; expert E is the dropped
    choices.
    """
    segment = tl.program_id(0)
    start = segment * segment_length
    stop = tl.minimum(start + segment_length, num_choices)
    e_E = tl.arange(0, BINS)
    total_E = tl.load(totals + e_E, mask=e_E <= num_experts, other=0)
    next_E = tl.cumsum(total_E, 0) - total_E  # the next free row of each expert
    if segment == 0:
        tl.store(offsets + e_E, next_E, mask=e_E <= num_experts)
    if tiles is not None and segment <= num_experts:
        write_tiles(
            tiles, num_tiles, segment, num_experts, e_E,
            start_E=next_E, length_E=total_E, BLOCK_M=BLOCK_M,
        )  # fmt: skip
    if start < stop:  # there may be more programs than segments
        next_E += tl.load(counts + e_E * num_segments + segment, mask=e_E <= num_experts, other=0)

    i_B = tl.arange(0, BLOCK)
    for first in range(start, stop, BLOCK):
        choice_B = first + i_B
        live_B = choice_B < stop
        expert_B = load_choices(experts, choice_B, stop, num_experts)
        # Which choices of the block come earlier and take the same expert? If such a choice is d
        # places earlier, its order is d less, and d ≤ i_B. Every other choice is further below, or
        # not below: then the difference is negative, which as an unsigned number is even larger.
        order_B = expert_B * BLOCK + i_B
        below_BB = ((order_B - 1)[None, :] - order_B[:, None]).to(tl.uint32, bitcast=True)
        earlier_B = tl.sum((below_BB < i_B[None, :].to(tl.uint32)).to(tl.int32), 0)
        row_B = tl.gather(next_E, expert_B, 0) + earlier_B
        tl.store(row_token + row_B, choice_B // TOP_K, mask=live_B)
        tl.store(row_slot + row_B, choice_B % TOP_K, mask=live_B)
        tl.store(slot_row + choice_B, tl.where(expert_B < num_experts, row_B, -1), mask=live_B)
        next_E += tl.histogram(expert_B, BINS, mask=live_B)


@triton.jit(do_not_specialize=["num_experts", "num_rows", "num_tiles"])
def tiles_kernel(
    offsets, tiles, num_experts, num_rows, num_tiles, BLOCK_M: tl.constexpr, BINS: tl.constexpr
):
    """Program e writes the tiles of expert e."""
    e_E = tl.arange(0, BINS)
    start_E = tl.load(offsets + e_E, mask=e_E <= num_experts, other=num_rows)
    stop_E = tl.load(offsets + e_E + 1, mask=e_E < num_experts, other=num_rows)
    length_E = stop_E - start_E
    write_tiles(
        tiles, num_tiles, tl.program_id(0), num_experts, e_E,
        start_E=start_E, length_E=length_E, BLOCK_M=BLOCK_M,
    )  # fmt: skip


@triton.jit
def write_tiles(
    tiles, num_tiles, expert, num_experts, e_E, start_E, length_E, BLOCK_M: tl.constexpr
):
    """Writes (expert, first row) of each of the expert's tiles. The tiles of the dropped choices
    come last; after them −1 marks the surplus."""
    tiles_E = (length_E + BLOCK_M - 1) // BLOCK_M
    before = tl.sum(tl.where(e_E < expert, tiles_E, 0), 0)
    own = tl.sum(tl.where(e_E == expert, tiles_E, 0), 0)
    start = tl.sum(tl.where(e_E == expert, start_E, 0), 0)
    end = tl.where(expert == num_experts, num_tiles - before, own)

    for first in range(0, end, BLOCK_M):
        i_M = first + tl.arange(0, BLOCK_M)
        tl.store(tiles + before + i_M, tl.where(i_M < own, expert, -1), mask=i_M < end)
        tl.store(tiles + num_tiles + before + i_M, start + i_M * BLOCK_M, mask=i_M < end)


def plan(
    experts: Tensor, num_experts: int, tile_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(offsets, row_token, row_slot, slot_row, tiles) of experts (T, K): see ``plan_dispatch`` and
    ``plan_tiles`` in ``ironmoe.kernels.dispatch``.

    tile_dtype: what the products compute in; without one there are no tiles.
    """
    experts = experts.contiguous()
    num_choices, top_k = experts.numel(), experts.shape[1]
    row_token = experts.new_empty(num_choices, dtype=torch.int32)
    row_slot = experts.new_empty(num_choices, dtype=torch.int32)
    slot_row = experts.new_empty(experts.shape, dtype=torch.int32)
    if num_choices == 0:
        offsets = experts.new_zeros(num_experts + 1, dtype=torch.int32)
        return offsets, row_token, row_slot, slot_row, offsets.new_empty((2, 0))

    blocks = cdiv(num_choices, BLOCK)
    segment_length = cdiv(blocks, MAX_SEGMENTS) * BLOCK
    num_segments = cdiv(num_choices, segment_length)
    offsets = experts.new_empty(num_experts + 1, dtype=torch.int32)
    counts = experts.new_empty((num_experts + 1, num_segments), dtype=torch.int32)
    totals = experts.new_empty(num_experts + 1, dtype=torch.int32)
    block_m = rows_per_tile(num_choices, num_experts, tile_dtype or torch.float32)
    num_tiles = max_tiles(num_choices, num_experts + 1, block_m) if tile_dtype else 0
    tiles = experts.new_empty((2, num_tiles), dtype=torch.int32)

    sizes: dict[str, Any] = {
        "num_choices": num_choices,
        "segment_length": segment_length,
        "num_segments": num_segments,
        "num_experts": num_experts,
    }
    bins = next_power_of_2(num_experts + 1)
    launch(
        count_kernel,
        num_segments,
        experts=experts,
        counts=counts,
        **sizes,
        BLOCK=COUNTED,
        BINS=bins,
    )
    launch(
        scan_kernel,
        num_experts + 1,
        counts=counts,
        totals=totals,
        num_segments=num_segments,
        SEGMENTS=next_power_of_2(num_segments),
    )
    programs = max(num_segments, num_experts + 1) if num_tiles else num_segments
    launch(
        place_kernel,
        programs,
        num_warps=1,
        experts=experts,
        counts=counts,
        totals=totals,
        offsets=offsets,
        row_token=row_token,
        row_slot=row_slot,
        slot_row=slot_row,
        tiles=tiles if num_tiles else None,
        **sizes,
        num_tiles=num_tiles,
        TOP_K=top_k,
        BLOCK=BLOCK,
        BINS=bins,
        BLOCK_M=block_m,
    )
    return offsets, row_token, row_slot, slot_row, tiles


def plan_tiles(offsets: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """(2, tiles) int32, expert and first row of each tile; −1 marks surplus ones. See
    ``ironmoe.kernels.dispatch.plan_tiles``."""
    num_experts = offsets.numel() - 1
    block_m = rows_per_tile(num_rows, num_experts, dtype)
    num_tiles = max_tiles(num_rows, num_experts + 1, block_m)
    tiles = offsets.new_empty(2, num_tiles)
    launch(
        tiles_kernel,
        num_experts + 1 if num_tiles else 0,
        offsets=offsets,
        tiles=tiles,
        num_experts=num_experts,
        num_rows=num_rows,
        num_tiles=num_tiles,
        BLOCK_M=block_m,
        BINS=next_power_of_2(num_experts + 1),
    )
    return tiles
