"""Every row to the rank of its expert and back, in buffers of one size: no shape depends on values,
and the host never waits, so the layer can be part of a CUDA graph.

A rank sends at most M rows to each rank of the group. The rest is dropped, as by a capacity, and
counted.

Shape suffixes: T tokens, K choices of a token, R rows, D their width, P ranks, L experts of a rank,
M places for the rows of one rank.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ironmoe.kernels import Dispatch
from ironmoe.kernels.route import may_look
from ironmoe.moe.exchange.agreement import Header, check_agreement, told
from ironmoe.moe.exchange.dropless import Experts
from ironmoe.moe.exchange.expert_rows import gathered, routing_of_rows
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.exchange.travel import Way, finish, start


def bounded(
    group: Group,
    header: Header,
    x_TD: Tensor,
    experts_TK: Tensor,
    plan: Dispatch,
    experts: Experts,
    meanwhile: Callable[[], None],
) -> tuple[Tensor, Dispatch, Tensor]:
    """(What the experts give, (P · M, D); the plan of these rows; () int64, how many choices this
    rank dropped.) The arguments are those of ``dropless``, and the experts of the choices (T, K);
    M is ``header.bounded``. On a GPU nobody looks whether the ranks agree."""
    places = header.bounded
    last_PL = _cumulative(plan.offsets, group.size)
    kept_PL = last_PL.clamp(max=places).diff(dim=1, prepend=torch.zeros_like(last_PL[:, :1]))
    dropped = (last_PL[:, -1] - places).clamp(min=0).sum()
    headers_PH, coming_PL = told(group, header, kept_PL)
    if may_look(headers_PH):
        check_agreement(group, header, headers_PH.tolist())

    plan = in_places(plan, experts_TK, group.size, places)
    way = Way(group, [places] * group.size, [places] * group.size)
    rows_RD = start(gathered(x_TD, plan), way)
    meanwhile()
    rows_RD = finish(rows_RD, way)

    # the expert of place m is the first whose rows end after it; there is none after all rows
    num_experts = coming_PL.shape[1]
    place_PM = torch.arange(places, device=x_TD.device).expand(group.size, -1).contiguous()
    experts_PM = torch.searchsorted(coming_PL.cumsum(1), place_PM, right=True)
    out_RD = experts(rows_RD, routing_of_rows(experts_PM.flatten(), x_TD, num_experts))
    out_RD = finish(start(out_RD, way.back), way.back)
    return out_RD, plan, dropped


def _cumulative(offsets: Tensor, ranks: int) -> Tensor:
    """(P, L) int64: how many rows go to the first 1 … L experts of each rank."""
    ends_PL = offsets[1:].long().view(ranks, -1)
    starts_P1 = offsets[:-1].long().view(ranks, -1)[:, :1]
    return ends_PL - starts_P1


def in_places(plan: Dispatch, experts_TK: Tensor, ranks: int, places: int) -> Dispatch:
    """The plan with M places for each rank in place of its rows. A row that finds no place is
    dropped. A place without a row repeats token 0; no expert works on it and nobody reads it."""
    offsets = plan.offsets.long()
    per_rank = (offsets.numel() - 1) // ranks
    first_P = offsets[:-1:per_rank]
    end_P = offsets[per_rank::per_rank]
    place_M = torch.arange(places, device=offsets.device)
    row_PM = first_P[:, None] + place_M
    row_R = torch.where(row_PM < end_P[:, None], row_PM, 0).flatten()

    is_kept_TK = plan.slot_row >= 0
    rank_TK = experts_TK.long().div(per_rank, rounding_mode="floor").clamp(max=ranks - 1)
    inside_TK = plan.slot_row.long() - first_P[rank_TK]
    slot_row_TK = torch.where(is_kept_TK & (inside_TK < places), rank_TK * places + inside_TK, -1)

    def placed(of_row: Tensor) -> Tensor:
        # without a choice there is no row to repeat
        return of_row[row_R] if of_row.numel() else of_row.new_zeros(len(row_R))

    return Dispatch(
        offsets=plan.offsets,
        row_token=placed(plan.row_token),
        row_slot=placed(plan.row_slot),
        slot_row=slot_row_TK.to(torch.int32),
    )


class Overflow:
    """How many choices of this rank found no place, and a warning where there were any.

    The host never waits for a device to say so: it has the count copied, and looks at the copy when
    a later pass comes. Passes that a CUDA graph repeats are said with the next pass outside it.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None  # () int64 on the device, since ``take``
        self._copy: Tensor | None = None  # in host memory, as it was some passes ago
        self._said = 0

    @torch.no_grad()
    def add(self, dropped: Tensor, *, layer: int, places: int) -> None:
        """Count the choices () int64 of a pass which its layer has dropped, with M places."""
        if self.total is None:
            self.total = _zero(dropped)
        self.total += dropped  # in place, so that each replay of a CUDA graph adds its own

        if may_look(dropped):
            seen = int(self.total)
        elif isinstance(dropped, FakeTensor) or _is_captured(dropped):
            return
        else:
            seen = self._seen_before(self.total)
        if seen > self._said:
            warnings.warn(
                f"{seen - self._said} choices were dropped in layer {layer}, because a rank sends "
                f"at most max_tokens_per_rank = {places} rows to each rank",
                stacklevel=3,
            )
            self._said = seen

    def take(self) -> int:
        """How many choices found no place since the last call. The host waits for the device."""
        if self.total is None:
            return 0
        taken = int(self.total)
        self.total.zero_()
        self._copy, self._said = None, 0
        return taken

    def _seen_before(self, total: Tensor) -> int:
        """The total when the last copy of it had come, at no wait; a new copy begins."""
        if self._copy is None:
            self._copy = _zero(total, device="cpu", pin_memory=total.is_cuda)
        seen = int(self._copy)
        self._copy.copy_(total, non_blocking=True)
        return seen


def _zero(like: Tensor, **options: Any) -> Tensor:
    """A number that a pass may change whether it runs in inference mode or not."""
    with torch.inference_mode(False):
        return torch.zeros_like(like, **options)


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
