"""Policies: other choices of experts than the router's, for ``intervene``.

They are the choice-of-experts experiments of arXiv 2210.10253 (its code was never released) and
what later work adds. A policy takes a ``Decision`` and returns a ``Routing``.

*Ranks* count from 1, the best: first the experts a token has, by gate, then the others by their
logits; ties to the earlier choice and to the lower index. Selection biases and groups of a router
shape what a token has, and not the order of the others.

Policies that choose other experts weigh them by ``gates``:

- "own": the gates that the router's rule gives these experts, from the logits without noise;
  differentiable with respect to the logits. The default where the rule is known (``TopKRouter``).
- "kept": the gates of the choices they replace, rank by rank; differentiable as those were. The
  default elsewhere (Hugging Face, Expert Choice).
- "uniform": 1 / number of the token's experts; constants.
- "renormalized": "own" (else "kept"), divided by their sum.
"""

from ironmoe.moe.routing.expert_policies import (
    AllExperts,
    DropBest,
    DropRank,
    Lowest,
    MaskExperts,
    OneExpert,
    PermuteExperts,
    RandomExperts,
    UseRanks,
)
from ironmoe.moe.routing.gate_policies import (
    FrozenGates,
    RenormalizedGates,
    SameSum,
    UniformGates,
)
from ironmoe.moe.routing.replay import Replay

__all__ = [
    "AllExperts",
    "DropBest",
    "DropRank",
    "FrozenGates",
    "Lowest",
    "MaskExperts",
    "OneExpert",
    "PermuteExperts",
    "RandomExperts",
    "RenormalizedGates",
    "Replay",
    "SameSum",
    "UniformGates",
    "UseRanks",
]
