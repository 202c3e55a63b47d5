"""Ranks: the experts of a token in the order in which a policy counts them.

First the experts the token has, by gate, then the others by their logits; ties to the earlier
choice and to the lower index. Experts whose logit is −∞ (other members' in an ensemble) have no
rank. Tensors of experts mark by E a place that nobody has.
"""

import torch
from torch import Tensor

from ironmoe.kernels import Routing
from ironmoe.kernels.route import transformed
from ironmoe.moe.routing.routed_layers import Decision


def by_rank(routing: Routing, num_experts: int) -> Routing:
    """The choices of a token by gate, the largest first, ties in the order they had; dropped ones
    last, with gate 0."""
    dropped_TK = routing.experts >= num_experts
    gates_TK = routing.gates.masked_fill(dropped_TK, 0)
    order_TK = (
        gates_TK.detach()
        .masked_fill(dropped_TK, float("-inf"))
        .argsort(dim=1, descending=True, stable=True)
    )
    return Routing(gates_TK.gather(1, order_TK), routing.experts.gather(1, order_TK))


def ranking(decision: Decision) -> Tensor:
    """(T, E) experts by rank: the choice in its order, then the others by logits; E in place of
    those that cannot be chosen."""
    if decision.logits is None:
        raise ValueError(
            f"this policy ranks experts by their logits, which the router of {decision.layer!r} "
            "does not give"
        )
    experts_TK, num_experts = decision.routing.experts.long(), decision.num_experts
    nobody_TE = torch.zeros(
        len(experts_TK), num_experts + 1, dtype=torch.bool, device=experts_TK.device
    )
    # not scatter_, which vmap forbids
    chosen_TE = nobody_TE.scatter(1, experts_TK, True)[:, :num_experts]
    others_TE = available(decision).masked_fill(chosen_TE, num_experts)
    by_logits_TE = decision.logits.detach().argsort(dim=1, descending=True, stable=True)
    return nobody_last(
        torch.cat([experts_TK, others_TE.gather(1, by_logits_TE)], dim=1), num_experts
    )[:, :num_experts]


def nobody_last(experts_TR: Tensor, num_experts: int) -> Tensor:
    """The same experts in the same order, E behind them."""
    return experts_TR.gather(
        1, (experts_TR == num_experts).to(torch.int8).argsort(dim=1, stable=True)
    )


def available(decision: Decision) -> Tensor:
    """(T, E): expert e at place e, or E where its logit is −∞."""
    experts_TE = torch.arange(decision.num_experts, device=decision.x.device).expand(
        len(decision.x), -1
    )
    return (
        experts_TE
        if decision.logits is None
        else experts_TE.masked_fill(decision.logits.isneginf(), decision.num_experts)
    )


def as_many_as_before(experts_TK: Tensor, decision: Decision, problem: str) -> Tensor:
    """Every token as many experts as it had, the rest dropped; ValueError where there are not so
    many."""
    surplus_TK = torch.arange(experts_TK.shape[1], device=experts_TK.device) >= count(decision)
    _no_token(
        (experts_TK == decision.num_experts) & ~surplus_TK, f"{problem}: too few experts", decision
    )
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
    if transformed():  # vmap lets nobody look
        return
    wrong = int(wrong_TK.any(1).sum())
    if wrong:
        raise ValueError(f"{problem} for {wrong} of {len(wrong_TK)} tokens of {decision.layer!r}")
