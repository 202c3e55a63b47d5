"""A model whose tokens stay with the experts that they have at given images.

A smoothness of the free model mixes two things: how fast the output changes while every token keeps
its experts, and how it jumps where a token changes them. Held routing leaves the first alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.routing.modes import FrozenRouting
from ironmoe.kernels import Routing
from ironmoe.moe import SoftMoE
from ironmoe.moe.routing.intervene import intervene
from ironmoe.moe.routing.routed_layers import Decision, routing_sites

ROUTINGS = ("free", "frozen", "gates_frozen")
"""How a measurement lets a model route, as ``held_routing`` explains it."""


def is_routed(model: Any) -> bool:
    """Whether the model has layers in which each token chooses experts, or experts their tokens. In
    a Soft MoE every token has a share in every expert, so nothing is chosen."""
    return isinstance(model, nn.Module) and bool(routing_sites(model))


def check_routing(routing: str, model: Any, name: str = "routing") -> None:
    """``name`` is the argument that the caller knows.

    Raises:
        ValueError: ``routing`` is none of ``ROUTINGS``.
        TypeError: it is not "free", and the model is no nn.Module, so that nothing can be held.
    """
    if not isinstance(routing, str) or routing not in ROUTINGS:
        raise ValueError(f"{name} must be one of {ROUTINGS}, got {routing!r}")
    if routing != "free":
        check_reachable(model, f'for {name} other than "free"')


def check_reachable(model: Any, purpose: str) -> None:
    """TypeError: the model is no nn.Module, so that it may hide layers that route."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, whose routed layers can be reached, {purpose}, got "
            f"{type(model).__name__}"
        )


@contextmanager
def held_routing(
    model: Any,
    x: Tensor,
    routing: str,
    ask: Callable[[Tensor], object] | None = None,
) -> Iterator[None]:
    """Inside the block the model routes each image of a batch as it routes the image of ``x`` at
    the same place. Costs one forward pass of ``x`` unless ``routing`` is "free".

    The model runs in the mode in which it is; measurements call this in eval mode. A model without
    routed layers is the same under every routing.

    Args:
        model: an nn.Module; if routing is "free", any callable from images to logits.
        x: (B, …) images. Inside the block the model takes B images at a time, in this order.
        routing: "free": nothing is held. "frozen": each token keeps the experts that it has at
            ``x``, dropped choices included, and the router weighs them as it finds the present
            tokens. "gates_frozen": experts and their gates are those of ``x``, as constants.
        ask: calls the model with images; None: ``model`` itself. It knows what else the model
            takes.

    Raises:
        ValueError: a routing of another name; "frozen" for a router whose rule for gates is not
            known (Hugging Face, Expert Choice); "gates_frozen" for a Soft MoE, which has no gates;
            a layer that runs several times in a pass; inside the block, another number of images.
        TypeError: something that is no nn.Module, unless routing is "free".
    """
    check_routing(routing, model)
    is_soft = isinstance(model, nn.Module) and any(isinstance(m, SoftMoE) for m in model.modules())
    if routing == "gates_frozen" and is_soft:
        raise ValueError(
            'routing must be "free" or "frozen" for a model with Soft MoE, whose mixtures are no '
            f"gates of chosen experts, got {routing!r}"
        )
    if routing == "free" or not is_routed(model):
        yield
        return

    mode = FrozenRouting("fresh" if routing == "frozen" else "recorded")
    recorded = mode.record(model, x.detach(), ask)
    counts = _tokens(model, recorded)

    def check(decision: Decision) -> Routing:
        _check_decision(decision, counts, len(x), routing)
        return decision.routing

    with intervene(model, check), mode.around(model, recorded):
        yield


def _tokens(model: nn.Module, recorded: Attempts) -> dict[str, int]:
    """How many tokens each layer had."""
    counts = {}
    for number, name in enumerate(routing_sites(model)):
        experts = recorded.get(f"routing.{number}.experts")
        counts[name] = 0 if experts is None else experts.shape[0] * experts.shape[1]
    return counts


def _check_decision(decision: Decision, counts: dict[str, int], images: int, routing: str) -> None:
    """ValueError: a decision that cannot be held."""
    if len(decision.x) != counts[decision.layer]:
        raise ValueError(
            f"the model must take the {images} images whose routing is held, with "
            f"{counts[decision.layer]} tokens in {decision.layer!r}, got {len(decision.x)} tokens"
        )
    if routing == "frozen" and (decision.gates_of is None or decision.logits is None):
        raise ValueError(
            f'routing must be "free" or "gates_frozen" where a router does not tell its rule for '
            f'gates, as that of {decision.layer!r}, got "frozen"'
        )
