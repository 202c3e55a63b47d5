"""Which experts have rows, and their numbers in a stack that holds these experts alone.

Shape suffixes: E experts, T tokens, K choices of a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ironmoe.kernels.dispatch import check_choices
from ironmoe.kernels.types import Dispatch, Routing


def experts_with_rows(routing: Routing, dispatch: Dispatch | None, num_experts: int) -> list[int]:
    """Their numbers, ascending. The host waits for the device that knows them.

    Raises:
        ValueError: a choice on CPU is no expert. On a GPU such a choice is dropped.
    """
    if dispatch is not None:
        has_rows_E = dispatch.offsets.diff() > 0
    else:
        experts_TK = routing.experts
        check_choices(experts_TK, num_experts)
        has_rows_E = torch.zeros(num_experts + 1, dtype=torch.bool, device=experts_TK.device)
        has_rows_E[_or_dropped(experts_TK, num_experts).flatten()] = True
        has_rows_E = has_rows_E[:num_experts]
    numbers: list[int] = has_rows_E.nonzero().flatten().tolist()
    return numbers


def renumbered(
    routing: Routing, dispatch: Dispatch | None, experts: Sequence[int], num_experts: int
) -> tuple[Routing, Dispatch | None]:
    """The same choices in a stack of these ``experts``, which ascend and are all that have rows,
    among others perhaps: expert ``experts[i]`` becomes i, and a dropped choice
    ``len(experts)``."""
    experts_TK = routing.experts
    there = torch.tensor([*experts, num_experts], device=experts_TK.device)
    number_E = experts_TK.new_full((num_experts + 1,), len(experts))
    number_E[there] = torch.arange(len(there), dtype=number_E.dtype, device=number_E.device)
    routing = routing._replace(experts=number_E[_or_dropped(experts_TK, num_experts)])
    if dispatch is not None:  # experts that are not there have no rows
        dispatch = dispatch._replace(offsets=dispatch.offsets[there])
    return routing, dispatch


def _or_dropped(experts_TK: Tensor, num_experts: int) -> Tensor:
    """The choices as indices, int64; what is no expert is dropped."""
    is_expert_TK = (experts_TK >= 0) & (experts_TK < num_experts)
    return experts_TK.long().where(is_expert_TK, num_experts)
