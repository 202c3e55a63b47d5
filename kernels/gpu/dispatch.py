"""Counting sort of the choices by expert, and the map from tiles to experts. No host sync, positions independent of timing.

Choices are cut into segments. Each segment counts its choices per expert; a scan turns the counts into the first row of every
(segment, expert); each segment then places its choices in order. Expert E holds the dropped choices and comes last.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ironmoe.kernels.gpu.launch import launch
from ironmoe.kernels.tuning import max_tiles, rows_per_tile

BLOCK = 128  # choices ranked at once, each against all others
MAX_SEGMENTS = 1024


@triton.jit
def load_choices(experts, i_B, stop, num_experts):
    """Expert of each choice; one outside 0 … E − 1 counts as dropped, so that no row is ever out of range."""
    expert_B = tl.load(experts + i_B, mask=i_B < stop, other=0)
    return tl.where((i_B < stop) & (expert_B >= 0) & (expert_B < num_experts), expert_B.to(tl.int32), num_experts)


@triton.jit(do_not_specialize=["num_choices", "segment_length", "num_experts", "num_segments"])
def count_kernel(
    experts, counts, num_choices, segment_length, num_segments, num_experts, BLOCK: tl.constexpr, BINS: tl.constexpr
):
    """counts[e, segment]: how many of the segment's choices take expert e."""
    segment = tl.program_id(0)
    start = segment * segment_length
    stop = tl.minimum(start + segment_length, num_choices)
    total_E = tl.zeros((BINS,), tl.int32)
    for first in range(start, stop, BLOCK):
        i_B = first + tl.arange(0, BLOCK)
        total_E += tl.histogram(load_choices(experts, i_B, stop, num_experts), BINS, mask=i_B < stop)
    e_E = tl.arange(0, BINS)
    tl.store(counts + e_E * num_segments + segment, total_E, mask=e_E <= num_experts)


@triton.jit(do_not_specialize=["num_segments"])
def scan_kernel(counts, totals, num_segments, SEGMENTS: tl.constexpr):
    """In place: counts of an expert's earlier segments; and its total."""
    expert = tl.program_id(0)
    s_S = tl.arange(0, SEGMENTS)
    count_S = tl.load(counts + expert * num_segments + s_S, mask=s_S < num_segments, other=0)
    tl.store(counts + expert * num_segments + s_S, tl.cumsum(count_S, 0) - count_S, mask=s_S < num_segments)
    tl.store(totals + expert, tl.sum(count_S, 0))


@triton.jit(do_not_specialize=["num_choices", "segment_length", "num_experts", "num_segments", "top_k"])
def place_kernel(
    experts, counts, totals, offsets, row_token, row_slot, slot_row, num_choices, segment_length, num_segments, num_experts,
    top_k, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Gives every choice its row: the expert's first row, plus earlier segments, plus earlier choices of this segment."""
    segment = tl.program_id(0)
    start = segment * segment_length
    stop = tl.minimum(start + segment_length, num_choices)
    e_E = tl.arange(0, BINS)
    total_E = tl.load(totals + e_E, mask=e_E <= num_experts, other=0)
    next_E = tl.cumsum(total_E, 0) - total_E
    if segment == 0:
        tl.store(offsets + e_E, next_E, mask=e_E <= num_experts)
    next_E += tl.load(counts + e_E * num_segments + segment, mask=e_E <= num_experts, other=0)
    for first in range(start, stop, BLOCK):
        i_B = first + tl.arange(0, BLOCK)
        live_B = i_B < stop
        expert_B = load_choices(experts, i_B, stop, num_experts)
        earlier_BB = (expert_B[None, :] == expert_B[:, None]) & (i_B[None, :] < i_B[:, None])
        row_B = tl.gather(next_E, expert_B, 0) + tl.sum(earlier_BB.to(tl.int32), 1)
        tl.store(row_token + row_B, i_B // top_k, mask=live_B)
        tl.store(row_slot + row_B, i_B % top_k, mask=live_B)
        tl.store(slot_row + i_B, tl.where(expert_B < num_experts, row_B, -1), mask=live_B)
        next_E += tl.histogram(expert_B, BINS, mask=live_B)


@triton.jit(do_not_specialize=["num_experts", "num_rows", "num_tiles"])
def tiles_kernel(offsets, tiles, num_experts, num_rows, num_tiles, BLOCK_M: tl.constexpr, BINS: tl.constexpr):
    """Program e writes (expert, first row) of each of its tiles; the last one marks the surplus with −1."""
    expert = tl.program_id(0)
    e_E = tl.arange(0, BINS)
    start_E = tl.load(offsets + e_E, mask=e_E <= num_experts, other=num_rows)
    stop_E = tl.load(offsets + e_E + 1, mask=e_E < num_experts, other=num_rows)
    tiles_E = (stop_E - start_E + BLOCK_M - 1) // BLOCK_M
    before = tl.sum(tl.where(e_E < expert, tiles_E, 0), 0)
    own = tl.sum(tl.where(e_E == expert, tiles_E, 0), 0)
    start = tl.sum(tl.where(e_E == expert, start_E, 0), 0)
    end = tl.where(expert == num_experts, num_tiles - before, own)
    for first in range(0, end, BLOCK_M):
        i_M = first + tl.arange(0, BLOCK_M)
        tl.store(tiles + before + i_M, tl.where(i_M < own, expert, -1), mask=i_M < end)
        tl.store(tiles + num_tiles + before + i_M, start + i_M * BLOCK_M, mask=i_M < end)


def plan(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(offsets, row_token, row_slot, slot_row) for experts (T, K): see ``ironmoe.kernels.plan_dispatch``."""
    experts = experts.contiguous()
    num_choices, top_k = experts.numel(), experts.shape[1]
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=experts.device)
    row_token = experts.new_empty(num_choices, dtype=torch.int32)
    row_slot = torch.empty_like(row_token)
    slot_row = experts.new_empty(experts.shape, dtype=torch.int32)
    if num_choices == 0:
        return offsets, row_token, row_slot, slot_row
    blocks = triton.cdiv(num_choices, BLOCK)
    segment_length = triton.cdiv(blocks, MAX_SEGMENTS) * BLOCK
    num_segments = triton.cdiv(num_choices, segment_length)
    counts = experts.new_empty(num_experts + 1, num_segments, dtype=torch.int32)
    totals = experts.new_empty(num_experts + 1, dtype=torch.int32)
    sizes: dict[str, Any] = {
        "num_choices": num_choices, "segment_length": segment_length, "num_segments": num_segments, "num_experts": num_experts,
    }  # fmt: skip
    shape: dict[str, Any] = {"BLOCK": BLOCK, "BINS": triton.next_power_of_2(num_experts + 1)}
    launch(count_kernel, num_segments, experts=experts, counts=counts, **sizes, **shape)
    launch(
        scan_kernel, num_experts + 1, counts=counts, totals=totals, num_segments=num_segments,
        SEGMENTS=triton.next_power_of_2(num_segments),
    )  # fmt: skip
    launch(
        place_kernel, num_segments, experts=experts, counts=counts, totals=totals, offsets=offsets, row_token=row_token,
        row_slot=row_slot, slot_row=slot_row, **sizes, top_k=top_k, **shape,
    )  # fmt: skip
    return offsets, row_token, row_slot, slot_row


def plan_tiles(offsets: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """(2, tiles) int32, expert and first row of each tile; −1 marks surplus ones. See ``ironmoe.kernels.dispatch.plan_tiles``."""
    num_experts = offsets.numel() - 1
    block_m = rows_per_tile(num_rows, num_experts, dtype)
    num_tiles = max_tiles(num_rows, num_experts + 1, block_m)
    tiles = offsets.new_empty(2, num_tiles)
    launch(
        tiles_kernel, num_experts + 1 if num_tiles else 0, offsets=offsets, tiles=tiles, num_experts=num_experts,
        num_rows=num_rows, num_tiles=num_tiles, BLOCK_M=block_m, BINS=triton.next_power_of_2(num_experts + 1),
    )  # fmt: skip
    return tiles
