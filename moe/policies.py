"""The policies of ``intervene``, by the name under which users import them."""

from ironmoe.moe.routing.policies import (
    AllExperts,
    DropBest,
    DropRank,
    FrozenGates,
    Lowest,
    MaskExperts,
    OneExpert,
    PermuteExperts,
    RandomExperts,
    RenormalizedGates,
    Replay,
    SameSum,
    UniformGates,
    UseRanks,
)

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
