"""Dispatch: from each token's choices to rows sorted by expert, and back."""

from typing import NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """Where every choice goes when the R = T·K choices are sorted by expert (stably, so by token inside an expert).

    offsets:   (E + 1,) int32; the rows of expert e are offsets[e] … offsets[e + 1] − 1. offsets[E] counts the kept choices
    row_token: (R,) int32; the token each row reads
    row_slot:  (R,) int32; which of its token's K choices the row is
    slot_row:  (T, K) int32; the row of each choice, −1 for a dropped one

    Rows from offsets[E] on belong to the dropped choices (sentinel expert E): no expert works on them.
    """

    offsets: Tensor
    row_token: Tensor
    row_slot: Tensor
    slot_row: Tensor


def plan_dispatch(experts: Tensor, num_experts: int) -> Dispatch:
    """Sort the choices by expert with a stable sort; positions are deterministic and no value goes to the host.

    Args:
        experts: (T, K) integer, values 0 … num_experts; num_experts itself marks a dropped choice.
        num_experts: E ≥ 1.

    Returns:
        Dispatch, int32 tensors on the device of ``experts``.

    Raises:
        ValueError: wrong shape or dtype, or (on CPU, where looking is free) an index out of range.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if experts.ndim != 2 or experts.is_floating_point() or experts.dtype == torch.bool:
        raise ValueError(f"experts must be an integer tensor (T, K), got {experts.dtype} of shape {tuple(experts.shape)}")
    if experts.device.type == "cpu" and not torch.compiler.is_compiling() and experts.numel():
        low, high = int(experts.min()), int(experts.max())
        if low < 0 or high > num_experts:
            raise ValueError(
                f"experts must lie in 0 … {num_experts} ({num_experts} = dropped), got values from {low} to {high}"
            )

    top_k = experts.shape[1]
    sorted_experts, row_choice = experts.flatten().sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=experts.device, dtype=sorted_experts.dtype)
    offsets = torch.searchsorted(sorted_experts, bounds, out_int32=True)
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
