"""Policies: other choices of experts than the router's, for ``intervene``.

They are the choice-of-experts experiments of arXiv 2210.10253 (its code was never released) and what later work adds. A policy
takes a ``Decision`` and returns a ``Routing``. Ranks count from 1, the best: the router's own choice first, in its order, then the
other experts by their logits, ties to the lower index.

Policies that choose other experts weigh them by ``gates``:

- "own": the gates that the router's rule gives these experts; differentiable with respect to the logits. The default where the
  rule is known (``TopKRouter``).
- "kept": the gates of the choices they replace, position by position; differentiable as those were. The default elsewhere
  (Hugging Face).
- "uniform": 1 / number of experts; constants.
- "renormalized": "own" (else "kept"), divided by their sum.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ironmoe.kernels import Routing
from ironmoe.moe.sites import Decision
from ironmoe.moe.trace import RoutingTrace

GATES = ("own", "kept", "uniform", "renormalized")


@dataclass(frozen=True)
class _Choice:
    """A policy that chooses experts; ``gates`` as above, None for the default."""

    gates: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.gates is not None and self.gates not in GATES:
            raise ValueError(f"gates must be one of {GATES} or None, got {self.gates!r}")

    def __call__(self, decision: Decision) -> Routing:
        experts_TK = self.choose(decision).to(torch.int32)
        return Routing(_gates(decision, experts_TK, self.gates, decision.logits), experts_TK)

    def choose(self, decision: Decision) -> Tensor:
        """(T, K′) experts."""
        raise NotImplementedError


@dataclass(frozen=True)
class UseRanks(_Choice):
    """The experts of ranks ``first`` … ``first`` + K − 1. ``UseRanks(1)`` is the router's own choice."""

    first: int = 1

    def choose(self, decision: Decision) -> Tensor:
        top_k = decision.routing.experts.shape[1]
        if not 1 <= self.first <= decision.num_experts - top_k + 1:
            raise ValueError(
                f"first must be from 1 to {decision.num_experts - top_k + 1} with {decision.num_experts} experts and top-{top_k}, got {self.first}"
            )
        return _ranking(decision)[:, self.first - 1 : self.first - 1 + top_k]


@dataclass(frozen=True)
class DropBest(_Choice):
    """Without the best expert: ranks 2 … K + 1."""

    def choose(self, decision: Decision) -> Tensor:
        return UseRanks(first=2).choose(decision)


@dataclass(frozen=True)
class Lowest(_Choice):
    """The K experts that the router likes least."""

    def choose(self, decision: Decision) -> Tensor:
        return UseRanks(first=decision.num_experts - decision.routing.experts.shape[1] + 1).choose(decision)


@dataclass(frozen=True)
class RandomExperts(_Choice):
    """K different experts at random, of all or of the ``among`` best. The draw depends on seed, layer, number of tokens and a
    token's place among them, so every forward of an attack on one batch sees the same one."""

    seed: int = 0
    among: int | None = None

    def choose(self, decision: Decision) -> Tensor:
        (num_tokens, top_k), among = decision.routing.experts.shape, self.among or decision.num_experts
        if not top_k <= among <= decision.num_experts:
            raise ValueError(f"among must be from K = {top_k} to E = {decision.num_experts} or None, got {self.among}")
        drawn_TM = torch.rand(num_tokens, among, generator=_generator(self.seed, decision.layer)).argsort(1)[:, :top_k]
        drawn_TK = drawn_TM.to(decision.x.device)
        return drawn_TK if self.among is None else _ranking(decision).gather(1, drawn_TK)


@dataclass(frozen=True)
class OneExpert(_Choice):
    """Expert ``index`` for every token, alone."""

    index: int = 0

    def choose(self, decision: Decision) -> Tensor:
        if not 0 <= self.index < decision.num_experts:
            raise ValueError(f"index must be from 0 to {decision.num_experts - 1}, got {self.index}")
        return torch.full_like(decision.routing.experts[:, :1], self.index)


@dataclass(frozen=True)
class AllExperts(_Choice):
    """Every expert for every token; by default their plain average. ``gates="own"``: weighed as the router would."""

    gates: str | None = field(default="uniform", kw_only=True)

    def choose(self, decision: Decision) -> Tensor:
        return torch.arange(decision.num_experts, device=decision.x.device).expand(len(decision.x), -1)


@dataclass(frozen=True)
class PermuteExperts(_Choice):
    """Expert e's tokens go to expert ``permutation[e]``, by default with the gates they had; without one, a random permutation for each
    layer from ``seed``."""

    gates: str | None = field(default="kept", kw_only=True)
    permutation: tuple[int, ...] | None = None
    seed: int = 0

    def choose(self, decision: Decision) -> Tensor:
        num_experts = decision.num_experts
        if self.permutation is None:
            order = torch.randperm(num_experts, generator=_generator(self.seed, decision.layer))
        elif sorted(self.permutation) != list(range(num_experts)):
            raise ValueError(f"permutation must hold 0 … {num_experts - 1} once each, got {self.permutation}")
        else:
            order = torch.tensor(self.permutation)
        dropped_stays = torch.cat([order, torch.tensor([num_experts])]).to(decision.x.device)
        return dropped_stays[decision.routing.experts.long()]


@dataclass(frozen=True)
class MaskExperts(_Choice):
    """As if these experts did not exist: the best K of the others, scored without them."""

    experts: Sequence[int] = ()

    def __call__(self, decision: Decision) -> Routing:
        num_experts, top_k = decision.num_experts, decision.routing.experts.shape[1]
        for index in self.experts:
            if not 0 <= index < num_experts:
                raise ValueError(f"experts must be from 0 to {num_experts - 1}, got {index}")
        masked_E = torch.zeros(num_experts, dtype=torch.bool, device=decision.x.device)
        masked_E[torch.tensor(list(self.experts), dtype=torch.int64, device=decision.x.device)] = True
        if len(set(self.experts)) > num_experts - top_k:
            raise ValueError(f"experts must leave K = {top_k} of {num_experts}, got {len(set(self.experts))} to mask")
        ranking_TE = _ranking(decision)
        last_TE = masked_E[ranking_TE].to(torch.int8).argsort(dim=1, stable=True)
        experts_TK = ranking_TE.gather(1, last_TE)[:, :top_k].to(torch.int32)
        assert decision.logits is not None  # _ranking has seen them
        return Routing(
            _gates(decision, experts_TK, self.gates, decision.logits.masked_fill(masked_E, float("-inf"))), experts_TK
        )


@dataclass(frozen=True)
class DropRank:
    """Without the choice of rank ``rank`` (1 … K); nothing takes its place and the other gates stay."""

    rank: int

    def __call__(self, decision: Decision) -> Routing:
        gates_TK, experts_TK = decision.routing
        if not 1 <= self.rank <= gates_TK.shape[1]:
            raise ValueError(f"rank must be from 1 to K = {gates_TK.shape[1]}, got {self.rank}")
        dropped_K = torch.arange(gates_TK.shape[1], device=gates_TK.device) == self.rank - 1
        return Routing(gates_TK.masked_fill(dropped_K, 0), experts_TK.masked_fill(dropped_K, decision.num_experts))


@dataclass(frozen=True)
class Replay:
    """The routing recorded in another forward of as many tokens: clean routing on adversarial images, or the other way round.

    gates: "recorded" (constants), or as above for fresh gates of the recorded experts.
    """

    trace: RoutingTrace
    gates: str = "recorded"

    def __post_init__(self) -> None:
        if self.gates not in ("recorded", *GATES):
            raise ValueError(f"gates must be one of {('recorded', *GATES)}, got {self.gates!r}")

    def __call__(self, decision: Decision) -> Routing:
        if decision.layer not in self.trace.layers:
            raise ValueError(f"trace must have a layer {decision.layer!r}, got {list(self.trace.layers)}")
        layer = self.trace.layers[decision.layer]
        tokens = len(layer.experts) if layer.routings else 0
        if tokens != len(decision.x):
            raise ValueError(f"trace must have recorded {len(decision.x)} tokens in {decision.layer}, got {tokens}")
        experts_TK = layer.experts
        if self.gates == "recorded":
            return Routing(layer.gates.detach().to(decision.routing.gates.dtype), experts_TK)
        return Routing(_gates(decision, experts_TK, self.gates, decision.logits), experts_TK)


@dataclass(frozen=True)
class FrozenGates:
    """The router's choice, its gates constants: no gradient reaches the router."""

    def __call__(self, decision: Decision) -> Routing:
        return decision.routing._replace(gates=decision.routing.gates.detach())


@dataclass(frozen=True)
class RenormalizedGates:
    """The router's choice, the gates of a token divided by their sum."""

    def __call__(self, decision: Decision) -> Routing:
        return decision.routing._replace(gates=_renormalized(decision.routing.gates))


@dataclass(frozen=True)
class UniformGates:
    """The router's choice, all kept choices of a token with the same weight, together 1."""

    def __call__(self, decision: Decision) -> Routing:
        kept_TK = decision.routing.experts < decision.num_experts
        gates_TK = kept_TK / kept_TK.sum(1, keepdim=True).clamp_min(1)
        return decision.routing._replace(gates=gates_TK.to(decision.routing.gates.dtype))


def _ranking(decision: Decision) -> Tensor:
    """(T, E) experts by rank: the choice in its order, then the others by logits."""
    if decision.logits is None:
        raise ValueError(f"this policy ranks experts by their logits, which the router of {decision.layer} does not give")
    experts_TK, num_experts = decision.routing.experts.long(), decision.num_experts
    by_logits_TE = decision.logits.detach().argsort(dim=1, descending=True, stable=True)
    places_E = torch.arange(num_experts, device=by_logits_TE.device).expand_as(by_logits_TE)
    place_TE = torch.empty_like(by_logits_TE).scatter_(1, by_logits_TE, places_E)
    chosen_first_TE = torch.cat([place_TE, torch.zeros_like(place_TE[:, :1])], dim=1)  # a dropped choice falls off the end
    choice_K = torch.arange(experts_TK.shape[1], device=experts_TK.device) - experts_TK.shape[1]
    chosen_first_TE = chosen_first_TE.scatter(1, experts_TK, choice_K.expand_as(experts_TK))[:, :num_experts]
    return chosen_first_TE.argsort(dim=1, stable=True)


def _gates(decision: Decision, experts_TK: Tensor, mode: str | None, logits_TE: Tensor | None) -> Tensor:
    """Gates (T, K′) of other experts than the router's; 0 for dropped ones."""
    dropped_TK = experts_TK >= decision.num_experts
    before_TK = decision.routing.gates
    known = decision.gates_of is not None and logits_TE is not None
    if mode == "own" and not known:
        raise ValueError(
            f'gates="own" needs the rule of the router, which {decision.layer} does not tell; use "kept" or "uniform"'
        )
    if mode == "uniform":
        gates_TK = torch.full(experts_TK.shape, 1 / experts_TK.shape[1], dtype=before_TK.dtype, device=before_TK.device)
    elif mode != "kept" and known:
        assert decision.gates_of is not None and logits_TE is not None
        gates_TK = decision.gates_of(logits_TE, experts_TK.clamp(max=decision.num_experts - 1))
    elif experts_TK.shape[1] <= before_TK.shape[1]:
        gates_TK = before_TK[:, : experts_TK.shape[1]]
    else:
        raise ValueError(
            f'gates must be "uniform" or "own" for {experts_TK.shape[1]} experts a token in place of {before_TK.shape[1]}'
        )
    gates_TK = gates_TK.masked_fill(dropped_TK, 0)
    return _renormalized(gates_TK) if mode == "renormalized" else gates_TK


def _renormalized(gates_TK: Tensor) -> Tensor:
    return gates_TK / gates_TK.sum(1, keepdim=True).clamp_min(torch.finfo(gates_TK.dtype).tiny)


def _generator(seed: int, layer: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer}".encode()))
