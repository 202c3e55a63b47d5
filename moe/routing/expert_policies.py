"""Policies that choose experts: other ones than the router's, or fewer.

A token that lost choices, or has fewer than K from an Expert Choice router (K = E there), has n
experts; a policy that ranks, draws or masks gives it n others. Experts whose logit is −∞ (those of
other members in an ensemble) are never chosen: a policy that is told to choose one, such as
``OneExpert``, raises ValueError. Such checks look at values, so on a GPU they wait for them; under
torch.func they are left out. ``ranks`` says how a policy counts experts, ``gates`` how it weighs
them.

Shape suffixes: T tokens, K choices, E experts, M experts that may be drawn.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ironmoe.kernels import Routing
from ironmoe.moe.routing.gates import GATES, gates_for
from ironmoe.moe.routing.ranks import (
    all_available,
    as_many_as_before,
    available,
    by_rank,
    count,
    nobody_last,
    ranking,
)
from ironmoe.moe.routing.routed_layers import Decision


@dataclass(frozen=True)
class _Choice:
    """A policy that chooses experts. A class below says how, in ``choose``.

    gates: one of ``GATES``, or None for the default; ``ironmoe.moe.policies`` explains them.
    """

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
        """(T, K′) experts, instead of those of the decision, whose routing is ordered by rank."""
        raise NotImplementedError

    def logits(self, decision: Decision) -> Tensor | None:
        """(T, E) logits from which the router's rule makes own gates; None if there are none."""
        return decision.logits


@dataclass(frozen=True)
class UseRanks(_Choice):
    """The experts of ranks ``first`` … ``first`` + K − 1. ``UseRanks(1)`` is the router's own
    choice."""

    first: int = 1

    def choose(self, decision: Decision) -> Tensor:
        num_experts, top_k = decision.num_experts, decision.routing.experts.shape[1]
        skipped = self.first - 1
        problem = (
            f"first must be from 1 to {num_experts - top_k + 1} with {num_experts} experts and "
            f"top-{top_k}, got {self.first}"
        )
        if not 0 <= skipped < num_experts:
            raise ValueError(problem)

        # pad takes experts away where it is asked to add a negative number
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

    The draw depends only on the seed, the layer, and a token's place in the batch: every forward
    with the same images in the same places draws the same experts. Another seed is another draw.
    """

    seed: int = 0
    among: int | None = None

    def choose(self, decision: Decision) -> Tensor:
        num_experts, (num_tokens, top_k) = decision.num_experts, decision.routing.experts.shape
        among = num_experts if self.among is None else self.among
        problem = f"among must be from K = {top_k} to E = {num_experts} or None, got {self.among}"
        if not top_k <= among <= num_experts:
            raise ValueError(problem)

        pool_TM = available(decision) if self.among is None else ranking(decision)[:, :among]
        generator = _generator(self.seed, decision.layer)
        score_TM = torch.rand(num_tokens, among, generator=generator).to(pool_TM.device)
        # places without an expert come last: 2 is more than any score
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
    """The tokens of expert e go to expert ``permutation[e]``, by default with the gates they had.

    Without a permutation each layer draws one from ``seed``; in an ensemble it permutes the experts
    of each member among themselves.
    """

    gates: str | None = field(default="kept", kw_only=True)
    permutation: Sequence[int] | None = None
    seed: int = 0

    def choose(self, decision: Decision) -> Tensor:
        num_experts, from_TE = decision.num_experts, available(decision)
        if self.permutation is None:
            generator = _generator(self.seed, decision.layer)
            order_E = torch.randperm(num_experts, generator=generator).to(from_TE.device)
            to_TE = nobody_last(from_TE[:, order_E], num_experts)
            from_TE = nobody_last(from_TE, num_experts)
        elif sorted(self.permutation) != list(range(num_experts)):
            raise ValueError(
                f"permutation must hold 0 … {num_experts - 1} once each, got {self.permutation}"
            )
        else:
            to_TE = torch.tensor(self.permutation, device=from_TE.device).expand_as(from_TE)
            from_TE = torch.arange(num_experts, device=from_TE.device).expand_as(from_TE)

        # Place E says where a dropped choice goes: it stays dropped.
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
        nothing = torch.zeros(num_experts + 1, dtype=torch.bool, device=experts_TK.device)
        is_masked = nothing.index_fill(0, self._indices(decision), True)
        left_TK = experts_TK.masked_fill(is_masked[experts_TK.long()], num_experts)
        routing = decision.routing._replace(experts=left_TK)
        left = decision._replace(routing=routing, logits=self.logits(decision))
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


def _generator(seed: int, layer: str) -> torch.Generator:
    """Random numbers of a layer, from its name: they do not depend on what ran before."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer}".encode()))
