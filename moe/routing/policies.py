"""Policies: other choices of experts than the router's, for ``intervene``.

They are the choice-of-experts experiments of arXiv 2210.10253 (its code was never released) and
what later work adds. A policy takes a ``Decision`` and returns a ``Routing``.

*Ranks* count from 1, the best: first the experts a token has, by gate, then the others by their
logits; ties to the earlier choice and to the lower index. Selection biases and groups of a router
shape what a token has, and not the order of the others.

A token that lost choices, or has fewer than K from an Expert Choice router (K = E there), has n
experts; a policy that ranks, draws or masks gives it n others. Experts whose logit is −∞ (other
members' in an ensemble) are never chosen: a policy that is told to, such as ``OneExpert``, raises
ValueError. Such checks look at values, so on a GPU they wait for them; under torch.func they are
left out.

Policies that choose other experts weigh them by ``gates``:

- "own": the gates that the router's rule gives these experts, from the logits without noise;
  differentiable with respect to the logits. The default where the rule is known (``TopKRouter``).
- "kept": the gates of the choices they replace, rank by rank; differentiable as those were. The
  default elsewhere (Hugging Face, Expert Choice).
- "uniform": 1 / number of the token's experts; constants.
- "renormalized": "own" (else "kept"), divided by their sum.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ironmoe.kernels import Routing
from ironmoe.moe.routing.gates import GATES, gates_for, uniform, with_sum
from ironmoe.moe.routing.ranks import (
    all_available,
    as_many_as_before,
    available,
    by_rank,
    count,
    nobody_last,
    ranking,
)
from ironmoe.moe.routing.routed_layers import Decision, Edit
from ironmoe.moe.routing.trace import LayerTrace, RoutingTrace


@dataclass(frozen=True)
class _Choice:
    """A policy that chooses experts; ``gates`` as above, None for the default."""

    gates: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.gates is not None and self.gates not in GATES:
            raise ValueError(f"gates must be one of {GATES} or None, got {self.gates!r}")

    def __call__(self, decision: Decision) -> Routing:
        decision = decision._replace(routing=by_rank(decision.routing, decision.num_experts))
        experts_TK = all_available(self.choose(decision).to(torch.int32), decision)
        return Routing(
            gates_for(decision, experts_TK, self.gates, self.logits(decision)), experts_TK
        )

    def choose(self, decision: Decision) -> Tensor:
        """(T, K′) experts; the decision's routing is ordered by rank."""
        raise NotImplementedError

    def logits(self, decision: Decision) -> Tensor | None:
        """(T, E), what own gates are made of."""
        return decision.logits


@dataclass(frozen=True)
class UseRanks(_Choice):
    """The experts of ranks ``first`` … ``first`` + K − 1. ``UseRanks(1)`` is the router's own
    choice."""

    first: int = 1

    def choose(self, decision: Decision) -> Tensor:
        num_experts, top_k, skipped = (
            decision.num_experts,
            decision.routing.experts.shape[1],
            self.first - 1,
        )
        problem = (
            f"first must be from 1 to {num_experts - top_k + 1} with {num_experts} experts and "
            f"top-{top_k}, got {self.first}"
        )
        if not 0 <= skipped < num_experts:
            raise ValueError(problem)
        # what pad is asked to add before and after; it may be negative
        cut = (-skipped, skipped + top_k - num_experts)
        ranks_TK = torch.nn.functional.pad(ranking(decision), cut, value=num_experts)
        return as_many_as_before(ranks_TK, decision, problem)


@dataclass(frozen=True)
class DropBest(_Choice):
    """Without the best expert: ranks 2 … K + 1."""

    def choose(self, decision: Decision) -> Tensor:
        return UseRanks(first=2).choose(decision)


@dataclass(frozen=True)
class Lowest(_Choice):
    """The K experts that the router likes least."""

    def choose(self, decision: Decision) -> Tensor:
        num_experts, top_k = decision.num_experts, decision.routing.experts.shape[1]
        ranking_TE = ranking(decision)
        first_T1 = (ranking_TE < num_experts).sum(1, keepdim=True) - count(decision)
        ranks_TK = first_T1 + torch.arange(top_k, device=ranking_TE.device)
        lowest_TK = ranking_TE.gather(1, ranks_TK.clamp(0, num_experts - 1))
        return as_many_as_before(lowest_TK, decision, f"Lowest needs {top_k} experts a token")


@dataclass(frozen=True)
class RandomExperts(_Choice):
    """K different experts at random, of all or of the ``among`` best.

    The draw depends on seed, layer, and a token's place in the batch alone: every forward with the
    same images in the same places sees the same one. Another seed is another draw."""

    seed: int = 0
    among: int | None = None

    def choose(self, decision: Decision) -> Tensor:
        num_experts, (num_tokens, top_k) = decision.num_experts, decision.routing.experts.shape
        among = num_experts if self.among is None else self.among
        problem = f"among must be from K = {top_k} to E = {num_experts} or None, got {self.among}"
        if not top_k <= among <= num_experts:
            raise ValueError(problem)
        pool_TM = available(decision) if self.among is None else ranking(decision)[:, :among]
        score_TM = torch.rand(
            num_tokens, among, generator=_generator(self.seed, decision.layer)
        ).to(pool_TM.device)
        # nobody's places last
        order_TM = score_TM.masked_fill(pool_TM == num_experts, 2).argsort(1)
        return as_many_as_before(pool_TM.gather(1, order_TM[:, :top_k]), decision, problem)


@dataclass(frozen=True)
class OneExpert(_Choice):
    """Expert ``index`` for every token, alone."""

    index: int = 0

    def choose(self, decision: Decision) -> Tensor:
        if not 0 <= self.index < decision.num_experts:
            raise ValueError(
                f"index must be from 0 to {decision.num_experts - 1}, got {self.index}"
            )
        return torch.full_like(decision.routing.experts[:, :1], self.index)


@dataclass(frozen=True)
class AllExperts(_Choice):
    """Every expert for every token; by default their plain average. ``gates="own"``: weighed as the
    router would."""

    gates: str | None = field(default="uniform", kw_only=True)

    def choose(self, decision: Decision) -> Tensor:
        known = decision.gates_of is not None
        if self.gates == "kept" or not (known or self.gates == "uniform"):
            allowed = '"uniform", "own" or "renormalized"' if known else '"uniform"'
            raise ValueError(
                f"gates must be {allowed} for all experts of {decision.layer!r}, got {self.gates!r}"
            )
        return available(decision)


@dataclass(frozen=True)
class PermuteExperts(_Choice):
    """Expert e's tokens go to expert ``permutation[e]``, by default with the gates they had;
    without one, a random permutation for each layer from ``seed``, in an ensemble of each member's
    experts among themselves."""

    gates: str | None = field(default="kept", kw_only=True)
    permutation: Sequence[int] | None = None
    seed: int = 0

    def choose(self, decision: Decision) -> Tensor:
        num_experts, from_TE = decision.num_experts, available(decision)
        if self.permutation is None:
            order_E = torch.randperm(
                num_experts, generator=_generator(self.seed, decision.layer)
            ).to(from_TE.device)
            from_TE, to_TE = (
                nobody_last(from_TE, num_experts),
                nobody_last(from_TE[:, order_E], num_experts),
            )
        elif sorted(self.permutation) != list(range(num_experts)):
            raise ValueError(
                f"permutation must hold 0 … {num_experts - 1} once each, got {self.permutation}"
            )
        else:
            to_TE = torch.tensor(self.permutation, device=from_TE.device).expand_as(from_TE)
            from_TE = torch.arange(num_experts, device=from_TE.device).expand_as(from_TE)
        # a dropped choice
        stays_TE = from_TE.new_full((len(from_TE), num_experts + 1), num_experts)
        return stays_TE.scatter(1, from_TE, to_TE).gather(1, decision.routing.experts.long())


@dataclass(frozen=True)
class MaskExperts(_Choice):
    """As if these experts did not exist: the best K of the others, scored without them."""

    experts: Sequence[int] = ()

    def choose(self, decision: Decision) -> Tensor:
        num_experts, top_k = decision.num_experts, decision.routing.experts.shape[1]
        for index in self.experts:
            if not 0 <= index < num_experts:
                raise ValueError(f"experts must be from 0 to {num_experts - 1}, got {index}")
        experts_TK = decision.routing.experts
        masked = torch.zeros(num_experts + 1, dtype=torch.bool, device=experts_TK.device)
        left_TK = experts_TK.masked_fill(
            masked.index_fill(0, self._indices(decision), True)[experts_TK.long()], num_experts
        )
        left = decision._replace(
            routing=decision.routing._replace(experts=left_TK), logits=self.logits(decision)
        )
        problem = (
            f"experts must leave K = {top_k} of {num_experts}, got {len(set(self.experts))} to mask"
        )
        return as_many_as_before(ranking(left)[:, :top_k], decision, problem)

    def logits(self, decision: Decision) -> Tensor | None:
        if decision.logits is None:
            return None
        return decision.logits.index_fill(1, self._indices(decision), float("-inf"))

    def _indices(self, decision: Decision) -> Tensor:
        return torch.tensor(list(self.experts), dtype=torch.int64, device=decision.x.device)


@dataclass(frozen=True)
class DropRank:
    """Without the expert of rank ``rank`` (1 … K); nothing takes its place and the other gates
    stay."""

    rank: int

    def __call__(self, decision: Decision) -> Routing:
        gates_TK, experts_TK = by_rank(decision.routing, decision.num_experts)
        if not 1 <= self.rank <= gates_TK.shape[1]:
            raise ValueError(f"rank must be from 1 to K = {gates_TK.shape[1]}, got {self.rank}")
        dropped_K = torch.arange(gates_TK.shape[1], device=gates_TK.device) == self.rank - 1
        return Routing(
            gates_TK.masked_fill(dropped_K, 0),
            experts_TK.masked_fill(dropped_K, decision.num_experts),
        )


@dataclass(frozen=True)
class Replay:
    """The routing carried out in another forward of as many tokens: clean routing on adversarial
    images, or the other way round.

    trace: of the whole model, or of the one layer to steer
    gates: "recorded" (constants), or as above for fresh gates of the recorded experts
    """

    trace: RoutingTrace | LayerTrace
    gates: str = "recorded"

    def __post_init__(self) -> None:
        if self.gates not in ("recorded", *GATES):
            raise ValueError(f"gates must be one of {('recorded', *GATES)}, got {self.gates!r}")

    def __call__(self, decision: Decision) -> Routing:
        layer = self._layer(decision)
        tokens = len(layer.experts) if layer.routings else 0
        if (tokens, layer.num_experts) != (len(decision.x), decision.num_experts):
            raise ValueError(
                f"trace must have recorded {len(decision.x)} tokens in {decision.layer} and "
                f"{decision.num_experts} experts, "
                f"got {tokens} and {layer.num_experts}"
            )
        recorded = Routing(
            layer.gates.detach().to(decision.routing.gates), layer.experts.to(decision.x.device)
        )
        all_available(recorded.experts, decision)
        if self.gates == "recorded":
            return recorded
        ranked = decision._replace(routing=by_rank(decision.routing, decision.num_experts))
        experts_TK = by_rank(recorded, decision.num_experts).experts
        return Routing(gates_for(ranked, experts_TK, self.gates, decision.logits), experts_TK)

    def _layer(self, decision: Decision) -> LayerTrace:
        if isinstance(self.trace, LayerTrace):
            return self.trace
        if decision.layer not in self.trace.layers:
            raise ValueError(
                f"trace must have a layer {decision.layer!r}, got {list(self.trace.layers)}"
            )
        return self.trace.layers[decision.layer]


@dataclass(frozen=True)
class FrozenGates:
    """The router's choice, its gates constants: no gradient reaches the router."""

    def __call__(self, decision: Decision) -> Routing:
        return decision.routing._replace(gates=decision.routing.gates.detach())


@dataclass(frozen=True)
class RenormalizedGates:
    """The router's choice, the gates of a token divided by their sum; differentiable."""

    def __call__(self, decision: Decision) -> Routing:
        return decision.routing._replace(gates=with_sum(decision.routing.gates, 1))


@dataclass(frozen=True)
class UniformGates:
    """The router's choice, all kept choices of a token with the same weight, together 1;
    constants."""

    def __call__(self, decision: Decision) -> Routing:
        return decision.routing._replace(gates=uniform(decision.routing.experts, decision))


@dataclass(frozen=True)
class SameSum:
    """What ``policy`` does, the new gates of a token scaled to the sum of its gates before (still 0
    where all new ones are); differentiable in both. How much experts weigh stays, so that what
    changes comes from which experts they are."""

    policy: Edit

    def __post_init__(self) -> None:
        if not callable(self.policy):
            raise TypeError(
                "policy must be a function from Decision to Routing, got "
                f"{type(self.policy).__name__}"
            )

    def __call__(self, decision: Decision) -> Routing:
        gates_TK, experts_TK = self.policy(decision)
        return Routing(with_sum(gates_TK, decision.routing.gates.sum(1, keepdim=True)), experts_TK)


def _generator(seed: int, layer: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer}".encode()))
