"""Ranks: the experts of a token in the order in which a policy counts them.

First come the experts the token has, by gate, then the others by their logits; ties go to the
earlier choice and to the lower index. Experts whose logit is −∞ (those of other members in an
ensemble) have no rank. In a tensor of experts, E ("nobody") fills a place without an expert.

Shape suffixes: T tokens, K choices, E experts, R any number of experts.
"""

import torch
from torch import Tensor

from ironmoe.kernels import Routing
from ironmoe.kernels.route import transformed
from ironmoe.moe.routing.routed_layers import Decision


def by_rank(routing: Routing, num_experts: int) -> Routing:
    """The choices of a token by gate, the largest first; equal ones stay in order. Dropped choices
    come last, with gate 0."""
    dropped_TK = routing.experts >= num_experts
    gates_TK = routing.gates.masked_fill(dropped_TK, 0)
    order_TK = (
        gates_TK.detach()
        .masked_fill(dropped_TK, float("-inf"))
        .argsort(dim=1, descending=True, stable=True)
    )
    return Routing(gates_TK.gather(1, order_TK), routing.experts.gather(1, order_TK))


def ranking(decision: Decision) -> Tensor:
    """(T, E) experts by rank: those of the token in its order, then the others by logits, then E
    for each expert that cannot be chosen. ValueError without logits."""
    if decision.logits is None:
        raise ValueError(
            f"this policy ranks experts by their logits, which the router of {decision.layer!r} "
            "does not give"
        )
    num_experts = decision.num_experts
    experts_TK = decision.routing.experts.long()

    # One place more than experts, for dropped choices. Not scatter_, which vmap forbids.
    false_TE = experts_TK.new_zeros(len(experts_TK), num_experts + 1, dtype=torch.bool)
    chosen_TE = false_TE.scatter(1, experts_TK, True)[:, :num_experts]
    others_TE = available(decision).masked_fill(chosen_TE, num_experts)
    by_logits_TE = decision.logits.detach().argsort(dim=1, descending=True, stable=True)
    all_TR = torch.cat([experts_TK, others_TE.gather(1, by_logits_TE)], dim=1)
    return nobody_last(all_TR, num_experts)[:, :num_experts]


def nobody_last(experts_TR: Tensor, num_experts: int) -> Tensor:
    """The same experts in the same order, with every E moved behind them."""
    is_nobody_TR = (experts_TR == num_experts).to(torch.int8)
    return experts_TR.gather(1, is_nobody_TR.argsort(dim=1, stable=True))


def available(decision: Decision) -> Tensor:
    """(T, E): expert e at place e, or E where its logit is −∞."""
    experts_E = torch.arange(decision.num_experts, device=decision.x.device)
    experts_TE = experts_E.expand(len(decision.x), -1)
    if decision.logits is None:
        return experts_TE
    return experts_TE.masked_fill(decision.logits.isneginf(), decision.num_experts)


def as_many_as_before(experts_TK: Tensor, decision: Decision, problem: str) -> Tensor:
    """Drop experts from the end until every token has as many as before. ValueError, which begins
    with ``problem``, where a token has too few."""
    surplus_TK = torch.arange(experts_TK.shape[1], device=experts_TK.device) >= count(decision)
    missing_TK = (experts_TK == decision.num_experts) & ~surplus_TK
    _no_token(missing_TK, f"{problem}: too few experts", decision)
    return experts_TK.masked_fill(surplus_TK, decision.num_experts)


def all_available(experts_TK: Tensor, decision: Decision) -> Tensor:
    """The same experts; ValueError where the logit of one is −∞, for which the router's rule has no
    gate."""
    # With E at place E: a dropped choice is always available.
    themselves = torch.nn.functional.pad(available(decision), (0, 1), value=decision.num_experts)
    wrong_TK = themselves.gather(1, experts_TK.long()) != experts_TK
    _no_token(
        wrong_TK,
        "experts must have a finite logit, but those chosen have −∞ (other members' of an "
        "ensemble?)",
        decision,
    )
    return experts_TK


def count(decision: Decision) -> Tensor:
    """(T, 1) how many experts a token has."""
    return (decision.routing.experts < decision.num_experts).sum(1, keepdim=True)


def _no_token(wrong_TK: Tensor, problem: str, decision: Decision) -> None:
    """ValueError if a choice of any token is wrong. It says how many tokens have one."""
    if transformed():  # under vmap no value can be read
        return
    wrong = int(wrong_TK.any(1).sum())
    if wrong:
        raise ValueError(f"{problem} for {wrong} of {len(wrong_TK)} tokens of {decision.layer!r}")
