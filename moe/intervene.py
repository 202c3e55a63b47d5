"""Steer routing: replace what routers decide while a block runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ironmoe.kernels import Routing
from ironmoe.moe.sites import Decision, attached, routing_sites

Policy = Callable[[Decision], Routing]


@contextmanager
def intervene(
    model: nn.Module, policy: Policy | Sequence[Policy], *, layers: Sequence[str | int] | None = None
) -> Iterator[nn.Module]:
    """Inside the block the experts of each token are what the policy makes of the router's choice, for every forward pass.

    It works on layers of this library, upcycled models, and Hugging Face models under any experts implementation. A capacity drops
    afterwards, from what the policy chose; a trace sees the policy's choice. Compiled models run eagerly inside the block. Gradients
    flow through the gates as each policy documents; a choice has no gradient.

    Args:
        model: any module with MoE layers.
        policy: one of ``ironmoe.moe.policies``, or any function Decision → Routing; several apply in order. Nested blocks apply the
            outer one first.
        layers: the layers to steer: names as ``trace_routing`` gives them, or their numbers in that order (negative ones from the
            last). None: all.

    Raises:
        ValueError: no MoE layer, an unknown layer; inside the block, what the policy itself does not accept.
        TypeError: a policy that is no function, or returns no Routing of the right shape.
    """
    policies = [policy] if callable(policy) else list(policy)
    for each in policies:
        if not callable(each):
            raise TypeError(f"policy must be a function from Decision to Routing, or several, got {type(each).__name__}")
    sites = routing_sites(model)
    if not sites:
        raise ValueError(f"model must have MoE layers to steer, got {type(model).__name__} with none")

    def edit(decision: Decision) -> Routing:
        for each in policies:
            decision = decision._replace(routing=_checked(each(decision), decision, each))
        return decision.routing

    names = list(sites) if layers is None else [_name(layer, list(sites)) for layer in layers]
    with attached(sites, dict.fromkeys(names, edit), {}):
        yield model


def _name(layer: str | int, names: list[str]) -> str:
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        return names[layer]
    if layer in names:
        return str(layer)
    raise ValueError(
        f"layers must be among {', '.join(names)}, or numbers from {-len(names)} to {len(names) - 1}, got {layer!r}"
    )


def _checked(routing: Routing, decision: Decision, policy: Policy) -> Routing:
    shapes = (
        [tuple(field.shape) for field in routing]
        if isinstance(routing, tuple) and len(routing) == 2
        else type(routing).__name__
    )
    tokens = len(decision.x)
    if isinstance(shapes, str) or shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != tokens:
        raise TypeError(f"policy {policy} must return Routing(gates, experts), both ({tokens}, K), got {shapes}")
    return routing
