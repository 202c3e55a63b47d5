"""Policies that keep a choice of experts and change its gates."""

from dataclasses import dataclass

from ironmoe.kernels import Routing
from ironmoe.moe.routing.gates import uniform, with_sum
from ironmoe.moe.routing.routed_layers import Decision, Edit


@dataclass(frozen=True)
class FrozenGates:
    """The router's choice, with its gates as constants: no gradient reaches the router."""

    def __call__(self, decision: Decision) -> Routing:
        return decision.routing._replace(gates=decision.routing.gates.detach())


@dataclass(frozen=True)
class RenormalizedGates:
    """The router's choice, with the gates of a token divided by their sum; differentiable."""

    def __call__(self, decision: Decision) -> Routing:
        return decision.routing._replace(gates=with_sum(decision.routing.gates, 1))


@dataclass(frozen=True)
class UniformGates:
    """The router's choice, with one weight for all kept choices of a token. Their sum is 1; they
    are constants."""

    def __call__(self, decision: Decision) -> Routing:
        return decision.routing._replace(gates=uniform(decision.routing.experts, decision))


@dataclass(frozen=True)
class SameSum:
    """Does what ``policy`` does, and scales the new gates of a token to the sum of its old ones.

    New gates that are all 0 stay 0. Differentiable with respect to both gates. The experts of a
    token weigh as much as before in all, so that what changes comes from which experts they are.
    """

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
