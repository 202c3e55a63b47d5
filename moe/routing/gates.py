"""Gates of experts that a policy chose in place of the router's."""

import torch
from torch import Tensor

from ironmoe.moe.routing.routed_layers import Decision

GATES = ("own", "kept", "uniform", "renormalized")  # as ironmoe.moe.policies explains them


def gates_for(
    decision: Decision, experts_TK: Tensor, mode: str | None, logits_TE: Tensor | None
) -> Tensor:
    """Gates (T, K′) of experts (T, K′) that are not the router's; a dropped choice has 0.

    mode: one of ``GATES``, or None for "own" where the router's rule is known and "kept" elsewhere.
    """
    before_TK = decision.routing.gates
    dropped_TK = experts_TK >= decision.num_experts
    known = decision.gates_of is not None and logits_TE is not None
    if mode == "own" and not known:
        raise ValueError(
            f'gates="own" needs the rule of the router, which {decision.layer!r} does not tell; '
            'use "kept" or "uniform"'
        )
    if mode == "uniform":
        return uniform(experts_TK, decision)

    if mode != "kept" and known:
        assert decision.gates_of is not None and logits_TE is not None
        # A dropped choice, expert E, gets the logit −∞: in a softmax it must weigh nothing.
        logits_and_dropped = torch.nn.functional.pad(logits_TE, (0, 1), value=float("-inf"))
        gates_TK = decision.gates_of(logits_and_dropped, experts_TK)
    elif experts_TK.shape[1] <= before_TK.shape[1]:
        gates_TK = before_TK[:, : experts_TK.shape[1]]
    else:
        raise ValueError(
            f'gates must be "uniform" or "own" for {experts_TK.shape[1]} experts a token in place '
            f"of {before_TK.shape[1]}, got {mode!r}"
        )

    gates_TK = gates_TK.masked_fill(dropped_TK, 0)
    return with_sum(gates_TK, 1) if mode == "renormalized" else gates_TK


def uniform(experts_TK: Tensor, decision: Decision) -> Tensor:
    """Gates (T, K): 1 / number of the token's experts; a dropped choice has 0."""
    kept_TK = experts_TK < decision.num_experts
    return (kept_TK / kept_TK.sum(1, keepdim=True).clamp_min(1)).to(decision.routing.gates.dtype)


def with_sum(gates_TK: Tensor, total: Tensor | int) -> Tensor:
    """Gates scaled to this sum, computed in float32 at least; gates that are all 0 stay so."""
    wide_TK = gates_TK.to(torch.promote_types(gates_TK.dtype, torch.float32))
    sum_T1 = wide_TK.sum(1, keepdim=True).clamp_min(torch.finfo(wide_TK.dtype).tiny)
    # in this order: total / sum overflows where all gates are 0
    return (wide_TK / sum_T1 * total).to(gates_TK.dtype)
