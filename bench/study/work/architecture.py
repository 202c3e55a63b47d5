"""What a model from elsewhere is to a study: its number of experts, its K, and its kind of
gates."""

import torch
from torch import Tensor, nn

from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.kernels import Routing
from ironmoe.moe import intervene
from ironmoe.moe.routing.routed_layers import Decision, RoutedLayer, routing_sites

TOKENS = 64  # made up, whose gates are asked for
BY_RULE, SEEN = 1e-5, 1e-2  # how near to 1 sums are: in float32, in any dtype of a model


def arm_of(name: str, model: nn.Module, image: Tensor, *, equal_cost: bool) -> Arm:
    """The arm of a model. image (1, C, S, S): one that it takes.

    "renormalize" is whether the gates of a token sum to 1 by the router's rule, whatever the
    weights: asked of made-up logits, or, of a router whose rule is not known, of this image. K is
    0 where tokens take no fixed number of experts. It is 0, too, where they take all and the gates
    do not sum to 1: with K = E an arm counts among those whose gates do.
    """
    sites = list(routing_sites(model).values())
    if not sites:
        return Arm(name, equal_width=not equal_cost)

    experts = max(site.num_experts for site in sites)
    top_k, sums_to_one = _routing_of(model, image, sites)
    if top_k == experts and not sums_to_one:
        top_k = 0
    renormalize = sums_to_one and top_k < experts
    return Arm(name, experts, top_k, renormalize, equal_width=not equal_cost)


def _routing_of(model: nn.Module, image: Tensor, sites: list[RoutedLayer]) -> tuple[int, bool]:
    """(the most experts that a token takes, whether all gates sum to 1)."""
    decisions: list[Decision] = []

    def look(decision: Decision) -> Routing:
        decisions.append(decision)
        return decision.routing

    try:
        with torch.no_grad(), intervene(model, look):
            model(image)
    except ValueError:  # experts that choose their tokens
        return 0, False
    top_k = max((decision.routing.gates.shape[1] for decision in decisions), default=0)
    return top_k, bool(decisions) and all(map(_sum_to_one, decisions))


def _sum_to_one(decision: Decision) -> bool:
    gates_TK, near = decision.routing.gates, SEEN
    if decision.gates_of is not None:
        generator = torch.Generator().manual_seed(0)
        logits_TE = torch.randn(TOKENS, decision.num_experts, generator=generator)
        experts_TK = logits_TE.topk(gates_TK.shape[1]).indices
        gates_TK, near = decision.gates_of(logits_TE, experts_TK), BY_RULE
    return bool(((gates_TK.double().sum(1) - 1).abs() < near).all())
