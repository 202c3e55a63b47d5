"""What routing modes and batch mates share: the routed layers of a model, the router logits of a
decision, and tensors over tokens sorted by image."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.kernels import Routing
from ironmoe.moe import SoftMoE
from ironmoe.moe.routers.wrapped import unwrapped
from ironmoe.moe.routing.callbacks import attached
from ironmoe.moe.routing.routed_layers import Decision, RoutedLayer, routing_sites


def routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """The MoE layers of a model by name; ValueError if there is none."""
    layers = routing_sites(model)
    if not layers and any(isinstance(module, SoftMoE) for module in model.modules()):
        raise ValueError(
            f"model must choose experts for an attack on its routing, got {type(model).__name__} "
            "with Soft MoE, where every token has a "
            "share in every expert: there is no choice to freeze or to divert, and plain attacks "
            "see all of its gradient"
        )

    if not layers:
        raise ValueError(
            f"model must have MoE layers for an attack on its routing, got {type(model).__name__} "
            "with none"
        )
    return layers


def known_logits(decision: Decision) -> Tensor:
    """(T, E) the router's logits in at least float32; ValueError where a router does not give them,
    or not with the gradient that is wanted."""
    if decision.logits is None:
        raise ValueError(
            f"this routing mode needs the router's logits, which the router of {decision.layer!r} "
            "does not give"
        )
    if torch.is_grad_enabled() and decision.x.requires_grad and not decision.logits.requires_grad:
        raise ValueError(
            "this routing mode needs the gradient of the router's logits, and those of "
            f"{decision.layer!r} have no graph: is its "
            "router under no_grad, or are its logits detached?"
        )
    return decision.logits.to(torch.promote_types(decision.logits.dtype, torch.float32))


@contextmanager
def router_logits(
    model: nn.Module, layers: dict[str, RoutedLayer]
) -> Iterator[dict[str, list[tuple[Tensor, Tensor | None]]]]:
    """The router logits (T, E) of each layer, with their graph, and the mask (T,) of its real
    tokens, one pair for each time that the layer runs inside the block."""
    seen: dict[str, list[tuple[Tensor, Tensor | None]]] = {name: [] for name in layers}

    def watch(decision: Decision, realised: Routing) -> None:
        seen[decision.layer].append((known_logits(decision), decision.mask))

    with attached(layers, {}, dict.fromkeys(layers, watch), model=model):
        yield seen


def one_pass(name: str, passes: list[Any]) -> Any:
    """What a layer did in one forward pass of the model."""
    if len(passes) != 1:
        raise ValueError(
            f"routing modes need layers that run once in a forward pass, but {name!r} ran "
            f"{len(passes)} times"
        )
    return passes[0]


def members_of(site: RoutedLayer) -> int:
    """How often each image's tokens come to the layer: M in an ensemble, member after member; else
    1."""
    router = None if site.router is None else unwrapped(site.router)
    return int(getattr(router, "ensemble_size", 1))


def by_image(values: Tensor, images: int, members: int) -> Tensor:
    """(M · R · N, …) of all tokens → (R, M · N, …) of R images with N tokens each."""
    if len(values) % (images * members):
        raise ValueError(
            f"every image must have as many tokens, got {len(values)} tokens for {images} images "
            f"× {members}"
        )
    return values.unflatten(0, (members, images, -1)).transpose(0, 1).flatten(1, 2)


def by_token(values: Tensor, members: int) -> Tensor:
    """(R, M · N, …) of R images → (M · R · N, …) of all tokens, in the order in which layers see
    them."""
    return values.unflatten(1, (members, -1)).transpose(0, 1).flatten(0, 2)


def mean_over_tokens(values_RN: Tensor, mask_RN: Tensor | None) -> Tensor:
    """(R,) the mean over an image's real tokens; 0 where it has none."""
    if mask_RN is None:
        return values_RN.mean(1)
    return values_RN.where(mask_RN, 0).sum(1) / mask_RN.sum(1).clamp_min(1)
