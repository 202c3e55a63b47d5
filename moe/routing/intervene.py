"""Steer routing: replace what routers decide while a block runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ironmoe.kernels import Routing
from ironmoe.kernels.route import may_look
from ironmoe.moe.routing.callbacks import attached
from ironmoe.moe.routing.routed_layers import Decision, Edit, routing_sites


@contextmanager
def intervene(
    model: nn.Module, policy: Edit | Sequence[Edit], *, layers: Sequence[str | int] | None = None
) -> Iterator[nn.Module]:
    """Inside the block the experts of each token are what the policy makes of the router's choice,
    for every forward pass.

    It works on layers of this library, upcycled models, and Hugging Face models under any experts
    implementation. A capacity drops afterwards, from what the policy chose; a trace sees the
    policy's choice. Masked tokens (padding) stay dropped, whatever the policy gives them. Compiled
    models run eagerly inside the block. Gradients flow through the gates
    as each policy documents; a choice has no gradient. With activation checkpointing the backward
    pass routes again, so it belongs inside the block, too.

    Args:
        model: any module with MoE layers.
        policy: one of ``ironmoe.moe.policies``, or any function Decision → Routing; several
            apply in order, each on what the one before it made. Nested blocks apply the outer one
            first.
        layers: the layers to steer: names as ``trace_routing`` gives them, or their numbers in that
            order (negative ones count from the last). None: all.

    Raises:
        ValueError: no MoE layer, an unknown layer; inside the block, what the policy itself does
            not accept, or experts that it returns outside 0 … E (looked at on CPU only, where that
            costs nothing).
        TypeError: a policy that is no function, or does not return a Routing of float gates and
            integer experts, both (T, K′).
    """
    policies = [policy] if callable(policy) else list(policy)
    for each in policies:
        if not callable(each):
            raise TypeError(
                "policy must be a function from Decision to Routing, or several, got "
                f"{type(each).__name__}"
            )
    routed = routing_sites(model)
    if not routed:
        raise ValueError(
            f"model must have MoE layers to steer, got {type(model).__name__} with none"
        )
    if isinstance(layers, (str, int)):
        raise TypeError(f"layers must be a sequence of names or numbers, or None, got {layers!r}")

    def edit(decision: Decision) -> Routing:
        for each in policies:
            decision = decision._replace(routing=_checked(each(decision), decision, each))
        return decision.routing

    names = list(routed) if layers is None else [_name(layer, list(routed)) for layer in layers]
    with attached(routed, dict.fromkeys(names, edit), {}, model=model):
        yield model


def _name(layer: str | int, names: list[str]) -> str:
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        return names[layer]
    if layer in names:
        return str(layer)
    raise ValueError(
        f"layers must be among {', '.join(names)}, or numbers from {-len(names)} to "
        f"{len(names) - 1}, got {layer!r}"
    )


def _checked(routing: Routing, decision: Decision, policy: Edit) -> Routing:
    """The routing, or an error that says what is wrong with it. A good one is returned as the same
    object: a layer sees by that whether anything changed."""
    if not isinstance(routing, Routing) or not all(isinstance(field, Tensor) for field in routing):
        raise TypeError(
            f"policy {policy} must return Routing(gates, experts) of two tensors, got "
            f"{type(routing).__name__}"
        )
    gates, experts = routing
    if not gates.is_floating_point() or experts.is_floating_point() or experts.dtype == torch.bool:
        raise TypeError(
            f"policy {policy} must return float gates and integer experts, got {gates.dtype} and "
            f"{experts.dtype}"
        )
    if gates.shape != experts.shape or gates.ndim != 2 or len(gates) != len(decision.x):
        raise TypeError(
            f"policy {policy} must return Routing(gates, experts), both ({len(decision.x)}, K), "
            f"got {tuple(gates.shape)} and {tuple(experts.shape)}"
        )
    if (
        may_look(experts)
        and experts.numel()
        and not 0 <= int(experts.min()) <= int(experts.max()) <= decision.num_experts
    ):
        raise ValueError(
            f"policy {policy} must return experts from 0 to {decision.num_experts} (dropped), "
            f"got {int(experts.min())} … {int(experts.max())}"
        )
    return routing if experts.dtype == torch.int32 else Routing(gates, experts.to(torch.int32))
