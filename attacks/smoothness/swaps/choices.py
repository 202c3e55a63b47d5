"""What a router compares to choose the experts of a token, with its graph.

Shape suffixes: B images, N tokens of an image, T tokens of all images, K choices, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.kernels.scores import get_score
from ironmoe.moe.routers.expert_choice import ExpertChoiceRouter
from ironmoe.moe.routers.top_k import TopKRouter
from ironmoe.moe.routers.wrapped import unwrapped
from ironmoe.moe.routing.routed_layers import Decision

# A choice counts as one of the largest keys if they miss it by no more than this share.
ROUNDING = 1e-5


class Choices(NamedTuple):
    """The choices of tokens, (T, …), or (B, N, …) sorted by image.

    keys:   (…, E), of which a token has the K largest, with their graph: logits, or scores plus a
        selection bias. 0 where an expert is not available
    chosen: (…, E) bool, the token has the expert
    others: (…, E) bool, it could have it and has not
    real:   (…) bool, False for padding
    """

    keys: Tensor
    chosen: Tensor
    others: Tensor
    real: Tensor

    @property
    def can_swap(self) -> Tensor:
        """(…) bool: the token has an expert, and could have another."""
        return self.chosen.any(-1) & self.others.any(-1)

    def next_pair(self) -> tuple[Tensor, Tensor]:
        """(…) int64 each: the chosen expert with the smallest key, and the other one with the
        largest. They mean nothing where the token cannot swap."""
        keys = self.keys.detach()
        last = keys.masked_fill(~self.chosen, float("inf")).argmin(-1)
        following = keys.masked_fill(~self.others, float("-inf")).argmax(-1)
        return last, following


def choices_of(decision: Decision, router: nn.Module | None) -> Choices:
    """What the router of a decision compared.

    Raises:
        ValueError: Expert Choice; groups of experts; a router that does not give its logits, or not
            with their gradient; a choice that is not that of the largest keys.
    """
    logits_TE = _logits(decision)
    rule = None if router is None else unwrapped(router)
    compared_TE, keys_TE = _keys(decision, rule, logits_TE)

    # One place more than experts, for choices that masks took away.
    tokens, num_experts = logits_TE.shape
    nobody_TE = torch.zeros(tokens, num_experts + 1, dtype=torch.bool, device=logits_TE.device)
    chosen_TE = nobody_TE.scatter(1, decision.routing.experts.long(), True)[:, :-1]
    available_TE = ~logits_TE.detach().isneginf()

    choices = Choices(
        keys=keys_TE.masked_fill(~available_TE, 0),
        chosen=chosen_TE,
        others=available_TE & ~chosen_TE & chosen_TE.any(1, keepdim=True),
        real=chosen_TE.any(1) if decision.mask is None else decision.mask,
    )
    _check_order(decision, choices, compared_TE.detach())
    return choices


def _logits(decision: Decision) -> Tensor:
    """(T, E) the router's logits in at least float32, with the gradient that the tokens have."""
    logits_TE = decision.logits
    if logits_TE is None:
        raise ValueError(
            f"layers must have routers that give their logits, got {decision.layer!r}, whose "
            "router does not"
        )
    if decision.x.requires_grad and not logits_TE.requires_grad:
        raise ValueError(
            "layers must have routers whose logits have a graph, got "
            f"{decision.layer!r}, whose router runs under no_grad or detaches them"
        )
    return logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))


def _keys(decision: Decision, rule: nn.Module | None, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """((T, E) what the router compares, (T, E) keys of the same order in which gaps are
    measured)."""
    if isinstance(rule, ExpertChoiceRouter):
        raise ValueError(
            f"layers must have tokens that choose experts, got {decision.layer!r} with Expert "
            "Choice, where experts choose tokens: there is no K-th choice of a token to swap"
        )
    if not isinstance(rule, TopKRouter):
        return logits_TE, logits_TE
    if rule.groups is not None:
        raise ValueError(
            f"layers must choose among all experts, got {decision.layer!r} with {rule.groups}, "
            "where a token may change whole groups"
        )

    by_score = rule.order == "score_first"
    compared_TE = get_score(rule.score).value(logits_TE) if by_score else logits_TE
    if rule.selection_bias is None:
        return compared_TE, logits_TE  # scores rise with their logits
    compared_TE = compared_TE + rule.selection_bias.to(compared_TE)
    return compared_TE, compared_TE


def _check_order(decision: Decision, choices: Choices, compared_TE: Tensor) -> None:
    """ValueError: a token has an expert though another one has a larger key."""
    last_T = compared_TE.masked_fill(~choices.chosen, float("inf")).amin(1)
    next_T = compared_TE.masked_fill(~choices.others, float("-inf")).amax(1)
    allowed_T = ROUNDING * last_T.abs().maximum(next_T.abs())
    wrong_T = choices.can_swap & (next_T - last_T > allowed_T)
    if bool(wrong_T.any()):
        raise ValueError(
            "layers must give each token the experts of its largest logits, as their router tells "
            f"them, got others for {int(wrong_T.sum())} of {len(wrong_T)} tokens of "
            f"{decision.layer!r} (an intervention, or a bias that the router does not tell)"
        )
