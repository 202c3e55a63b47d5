"""Capacity: an expert takes so many tokens of a group and no more."""

import copy
import math

import torch
from einops import rearrange
from torch import Tensor

from ironmoe.kernels import Routing
from ironmoe.kernels.checks import check_counts
from ironmoe.kernels.onnx_graph import count_below, stable_sort
from ironmoe.kernels.route import exporting
from ironmoe.moe.routers.groups import Grouped
from ironmoe.moe.routers.masks import checked_mask, without_masked


class Capacity(Grouped):
    """Drops the choices that find their expert full, as the official V-MoE code does (arXiv
    2106.05974, section 2 and 4).

    In each group every expert has C places. All first choices are placed before any second choice;
    among equals the earlier token goes first, or with ``priority`` the token with the larger first
    gate (Batch Prioritized Routing). A choice that finds no place is dropped: its expert becomes E
    and its gate 0. The other gates stay as they were, and the token is not sent to another expert.

    Tokens of a group, and so the images in it, influence each other: whether a token of an image is
    dropped depends on the other images of its group.

    Args:
        factor: C = ⌈factor · S · K / E⌉ for groups of S tokens, rounded up to a multiple of
            ``multiple_of``. At factor ≥ E / K nothing is dropped.
        images_per_group, tokens_per_group: what a group is; by default the whole batch.
        priority: place the tokens with the largest first gate first.
        multiple_of: 4 in the official code; 1 leaves C as it is.
        places: C itself, in place of ``factor`` (Switch Transformer's expert_capacity).
        renormalize: divide the gates a token keeps by their sum (NLLB-MoE); V-MoE does not.
    """

    def __init__(
        self,
        factor: float | None = None,
        *,
        images_per_group: int | None = None,
        tokens_per_group: int | None = None,
        priority: bool = False,
        multiple_of: int = 4,
        places: int | None = None,
        renormalize: bool = False,
    ) -> None:
        super().__init__(images_per_group, tokens_per_group)
        if (factor is None) == (places is None):
            raise ValueError(
                f"give either factor or places, got factor={factor} and places={places}"
            )
        if factor is not None and not 0 < factor < math.inf:
            raise ValueError(f"factor must be finite and above 0, got {factor}")
        if places is not None:
            check_counts(places=places)
        check_counts(multiple_of=multiple_of)
        self.factor = factor
        self.priority = priority
        self.multiple_of = multiple_of
        self.places = places
        self.renormalize = renormalize
        self.members = 1

    def places_for(self, num_choices: int, num_experts: int) -> int:
        """C for a group with ``num_choices`` = S · K choices among E experts."""
        if self.factor is None:
            return int(self.places or 0)
        return places(num_choices * self.members, num_experts, self.factor, self.multiple_of)

    def for_members(self, members: int) -> "Capacity":
        """The same rule for an ensemble, whose members have E / members experts each. Their tokens
        come member after member, so a group of images holds the tokens of one member, which compete
        for fewer experts; C stays what it was."""
        own = copy.deepcopy(self)
        # Without a group size the one group holds the tokens of all members.
        if self.images_per_group is not None or self.tokens_per_group is not None:
            own.members = members
        return own

    def forward(
        self,
        routing: Routing,
        num_experts: int,
        tokens_per_group: int,
        mask: Tensor | None = None,
    ) -> Routing:
        """Routing → Routing, choices beyond the capacity dropped. Nothing is read back to the host.

        ``mask`` (T,) bool: False marks padding, which takes no place and does not count in S, so
        that the real tokens of a group fare as they would without it.
        """
        if mask is not None:
            mask = checked_mask(mask, routing.gates.shape[:-1])
            routing = without_masked(routing, mask, num_experts)
        if exporting():
            kept_TK = self._kept_of_any_number(routing, num_experts, tokens_per_group, mask)
        else:
            kept_TK = self._kept(routing, num_experts, tokens_per_group, mask)
        gates_TK = routing.gates.masked_fill(~kept_TK, 0)
        if self.renormalize:
            gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True).clamp_min(
                torch.finfo(gates_TK.dtype).tiny
            )
        return Routing(gates_TK, routing.experts.masked_fill(~kept_TK, num_experts))

    def _kept(
        self, routing: Routing, num_experts: int, tokens_per_group: int, mask: Tensor | None
    ) -> Tensor:
        """(T, K) bool: whether the choice finds a place. The whole groups, then the last one."""
        num_tokens = routing.gates.shape[0]
        whole = num_tokens // tokens_per_group * tokens_per_group
        parts = [(0, whole, tokens_per_group), (whole, num_tokens, num_tokens - whole)]
        kept = [
            self._fits(
                Routing(*(field[start:stop].unflatten(0, (-1, size)) for field in routing)),
                num_experts,
                None if mask is None else mask[start:stop].unflatten(0, (-1, size)),
            )
            for start, stop, size in parts
            if stop > start
        ]
        if not kept:
            return torch.ones_like(routing.experts, dtype=torch.bool)
        return torch.cat([part_GSK.flatten(0, 1) for part_GSK in kept])

    def _kept_of_any_number(
        self, routing: Routing, num_experts: int, tokens_per_group: int, mask: Tensor | None
    ) -> Tensor:
        """``_kept`` without a look at the number of tokens: the last group is filled up with
        padding."""
        if mask is None:
            mask = torch.ones_like(routing.experts[:, 0], dtype=torch.bool)
        gates_GSK, experts_GSK = (self.in_groups(field, tokens_per_group) for field in routing)
        mask_GS = self.in_groups(mask, tokens_per_group)
        experts_GSK = experts_GSK.masked_fill(~mask_GS[..., None], num_experts)
        fits_GSK = self._fits(Routing(gates_GSK, experts_GSK), num_experts, mask_GS)
        return self.out_of_groups(fits_GSK, mask.shape[0])

    def _fits(self, routing: Routing, num_experts: int, mask_GS: Tensor | None) -> Tensor:
        """(G, S, K) bool: whether the choice finds a place."""
        gates_GSK, experts_GSK = routing
        _, size, top_k = experts_GSK.shape
        if self.priority:
            _, order_GS1 = stable_sort(gates_GSK[..., :1], 1, descending=True)
            order_GSK = order_GS1.expand(-1, -1, top_k)
            experts_GSK = experts_GSK.gather(1, order_GSK)
        # first choices of all tokens, then second choices
        queue_GQ = rearrange(experts_GSK, "g s k -> g (k s)")
        position_GQ = _position_among_equals(queue_GQ, num_experts)
        if mask_GS is None:
            fits_GQ = position_GQ < self.places_for(size * top_k, num_experts)
        else:
            fits_GQ = position_GQ < self._places_of_real(mask_GS, top_k, num_experts)[:, None]
        fits_GSK = rearrange(fits_GQ, "g (k s) -> g s k", k=top_k)
        if self.priority:
            fits_GSK = fits_GSK.gather(1, stable_sort(order_GSK, 1)[1])
        return fits_GSK & (routing.experts < num_experts)

    def _places_of_real(self, mask_GS: Tensor, top_k: int, num_experts: int) -> Tensor:
        """(G,) int64: C of each group, by its real tokens."""
        choices_G = mask_GS.sum(-1) * top_k * self.members
        if self.factor is None:
            return torch.full_like(choices_G, self.places or 0)
        return places_of(choices_G, num_experts, self.factor, self.multiple_of)

    def extra_repr(self) -> str:
        size = (
            f"factor={self.factor}, multiple_of={self.multiple_of}"
            if self.places is None
            else f"places={self.places}"
        )
        return f"{size}, {super().extra_repr()}, priority={self.priority}"


def places(num_choices: int, num_experts: int, factor: float, multiple_of: int) -> int:
    """⌈factor · choices / E⌉, rounded up to a multiple of ``multiple_of``."""
    return math.ceil(math.ceil(num_choices * factor / num_experts) / multiple_of) * multiple_of


def places_of(choices_G: Tensor, num_experts: int, factor: float, multiple_of: int) -> Tensor:
    """``places`` of numbers of choices (G,) int64 that only the device knows, to the last unit."""
    wanted_G = choices_G.double() * factor
    # By a tensor: CUDA multiplies by the reciprocal of a number, which may round past an integer.
    full_G = (wanted_G / torch.full_like(wanted_G, num_experts)).ceil().long()
    return (full_G + multiple_of - 1) // multiple_of * multiple_of


def _position_among_equals(queue_GQ: Tensor, num_experts: int) -> Tensor:
    """(G, Q): how many earlier entries of the same row name the same expert. By a stable sort:
    memory of size Q, not Q · E."""
    sorted_GQ, source_GQ = stable_sort(queue_GQ.long(), 1)
    first_GE = count_below(sorted_GQ, torch.arange(num_experts + 1, device=queue_GQ.device))
    rank_GQ = torch.arange(queue_GQ.shape[1], device=queue_GQ.device) - first_GE.gather(
        1, sorted_GQ
    )
    return torch.empty_like(rank_GQ).scatter_(1, source_GQ, rank_GQ)
