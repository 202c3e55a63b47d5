"""Dispatch: from each token's choices to rows sorted by expert, and back; and the map from tiles of
rows to experts."""

import torch
from torch import Tensor
from torch.library import custom_op

from ironmoe.kernels.onnx_graph import count_below, stable_sort
from ironmoe.kernels.route import (
    exporting,
    may_look,
    takes_operators,
    takes_triton,
    transformed,
)
from ironmoe.kernels.tuning import max_tiles, rows_per_tile
from ironmoe.kernels.types import Dispatch


def plan_dispatch(experts: Tensor, num_experts: int) -> Dispatch:
    """Sort the choices by expert, stably; positions are deterministic and no value goes to the
    host.

    Args:
        experts: (T, K) integer, values 0 … num_experts; num_experts itself marks a dropped choice.
        num_experts: E ≥ 1.

    Returns:
        Dispatch, int32 tensors on the device of ``experts``.

    Raises:
        ValueError: wrong shape or dtype, or (on CPU, where looking is free) an index out of range.
            On a GPU such a choice is dropped.
    """
    check_choices(experts, num_experts)
    if takes_operators(experts) and not transformed():
        return Dispatch(*plan_dispatch_op(experts, num_experts, None)[:4])
    return _sorted(experts, num_experts)


def plan_with_tiles(
    experts: Tensor, num_experts: int, dtype: torch.dtype
) -> tuple[Dispatch, Tensor | None]:
    """``plan_dispatch`` and ``tiles_ahead`` for products in ``dtype`` as one operator."""
    check_choices(experts, num_experts)
    if exporting():
        return Dispatch(*plan_dispatch_op(experts, num_experts, None)[:4]), None
    *dispatch, tiles = plan_dispatch_op(experts, num_experts, dtype)
    return Dispatch(*dispatch), tiles


def tiles_ahead(offsets: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor | None:
    """``plan_tiles``, once for all products of a layer; None while torch.export traces.

    How many tiles there are depends on a bucket of ``num_rows``. As a shape in the graph it would
    narrow the sizes that an exported program takes, so there each product cuts its own.
    """
    return None if exporting() else plan_tiles(offsets, num_rows, dtype)


def check_choices(experts: Tensor, num_experts: int) -> None:
    """ValueError that names what is wrong: experts must be integers (T, K), and on CPU, where
    looking is free, from 0 to E."""
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if experts.ndim != 2 or experts.is_floating_point() or experts.dtype == torch.bool:
        raise ValueError(
            f"experts must be an integer tensor (T, K), got {experts.dtype} of shape "
            f"{tuple(experts.shape)}"
        )
    if may_look(experts) and experts.numel():
        low, high = int(experts.min()), int(experts.max())
        if low < 0 or high > num_experts:
            raise ValueError(
                f"experts must lie in 0 … {num_experts} ({num_experts} = dropped), got values "
                f"from {low} to {high}"
            )


def _sorted(experts: Tensor, num_experts: int) -> Dispatch:
    """The torch twin, by a stable sort."""
    top_k = experts.shape[1]
    sorted_experts, row_choice = stable_sort(experts.flatten(), 0)
    bounds = torch.arange(num_experts + 1, device=experts.device, dtype=sorted_experts.dtype)
    offsets = count_below(sorted_experts, bounds).to(torch.int32)
    rows = torch.arange(row_choice.numel(), device=experts.device, dtype=torch.int32)
    rows = torch.where(sorted_experts < num_experts, rows, -1)
    slot_row = torch.empty_like(rows).scatter_(0, row_choice, rows).view(experts.shape)
    row_token = row_choice.div(max(top_k, 1), rounding_mode="floor")
    return Dispatch(
        offsets=offsets,
        row_token=row_token.to(torch.int32),
        row_slot=(row_choice - row_token * top_k).to(torch.int32),
        slot_row=slot_row,
    )


@custom_op("ironmoe::plan_dispatch", mutates_args=())
def plan_dispatch_op(
    experts: Tensor, num_experts: int, tile_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of a Dispatch, and its tiles for products in ``tile_dtype``; none without a
    dtype."""
    if takes_triton(experts):
        from ironmoe.kernels.gpu import dispatch as gpu

        return gpu.plan(experts, num_experts, tile_dtype)
    dispatch = _sorted(experts, num_experts)
    if tile_dtype is None:
        return *dispatch, dispatch.offsets.new_empty(2, 0)
    return *dispatch, _cut(dispatch.offsets, experts.numel(), tile_dtype)


@plan_dispatch_op.register_fake
def _(experts, num_experts, tile_dtype):  # type: ignore[no-untyped-def]
    num_rows = experts.shape[0] * experts.shape[1]
    rows = experts.new_empty(num_rows, dtype=torch.int32)
    offsets = experts.new_empty(num_experts + 1, dtype=torch.int32)
    tiles = offsets.new_empty(2, _num_tiles(num_rows, num_experts, tile_dtype) if tile_dtype else 0)
    slot_row = experts.new_empty(experts.shape, dtype=torch.int32)
    return offsets, rows, torch.empty_like(rows), slot_row, tiles


@custom_op("ironmoe::plan_tiles", mutates_args=())
def plan_tiles(offsets: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """(2, tiles) int32 for the grouped products in ``dtype``: expert and first row of each tile of
    ``rows_per_tile`` rows.

    There are as many as any routing of ``num_rows`` rows can need; −1 marks what this one does not.
    Expert E holds the dropped rows.
    """
    if takes_triton(offsets):
        from ironmoe.kernels.gpu import dispatch as gpu

        return gpu.plan_tiles(offsets, num_rows, dtype)
    return _cut(offsets, num_rows, dtype)


@plan_tiles.register_fake
def _(offsets, num_rows, dtype):  # type: ignore[no-untyped-def]
    return offsets.new_empty(2, _num_tiles(num_rows, offsets.numel() - 1, dtype))


def _cut(offsets: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """The torch twin of the tiles."""
    num_experts = offsets.numel() - 1
    block = rows_per_tile(num_rows, num_experts, dtype)
    starts = torch.cat([offsets, offsets.new_tensor([num_rows])]).long()
    tiles_of = (starts.diff() + block - 1).div(block, rounding_mode="floor")
    first_tile = tiles_of.cumsum(0) - tiles_of
    tile = torch.arange(_num_tiles(num_rows, num_experts, dtype), device=offsets.device)
    expert = torch.searchsorted(first_tile + tiles_of, tile, right=True)
    used, expert = expert <= num_experts, expert.clamp_max(num_experts)
    first_row = starts[expert] + (tile - first_tile[expert]) * block
    return torch.stack([torch.where(used, expert, -1), first_row]).to(torch.int32)


def _num_tiles(num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    return max_tiles(num_rows, num_experts + 1, rows_per_tile(num_rows, num_experts, dtype))
