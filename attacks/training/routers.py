"""What methods for mixtures of experts know of routers: which weights are theirs, and how far
routing moves from one outer pass to another.

Shape suffixes: T tokens, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ironmoe.attacks.routing.layers import mean_over_tokens, routed_layers, router_logits
from ironmoe.attacks.training.inner.attacks import kl_divergence


def router_weights(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The weights of the router of each MoE layer, by the layer's name; none where its router is
    not known. ValueError: the model has no MoE layer that chooses experts."""
    return {
        name: [] if site.router is None else list(site.router.parameters())
        for name, site in routed_layers(model).items()
    }


class RoutingOfPasses:
    """The router logits of two outer passes over as many tokens, first the clean images, then the
    points; see ``routing_of_passes``."""

    def __init__(
        self, model: nn.Module, passes: dict[str, list[tuple[Tensor, Tensor | None]]]
    ) -> None:
        self._model = model
        self._passes = passes

    def divergence(self, *, through_clean: bool = True) -> Tensor:
        """() the mean over layers and real tokens of KL(routing of the clean images ‖ routing of
        the points), a routing being softmax(router logits).

        Args:
            through_clean: False makes the routing of the clean images a constant.

        Raises:
            ValueError: no MoE layer ran; a router's logits have no graph to its weights.
        """
        weights = router_weights(self._model)
        means: list[Tensor] = []
        for name, passes in self._passes.items():
            half = len(passes) // 2  # a layer may run several times in a pass
            for (clean_TE, mask_T), (logits_TE, _) in zip(
                passes[:half], passes[half:], strict=True
            ):
                _check_graph(name, logits_TE, weights[name])
                divergence_T = kl_divergence(
                    clean_TE if through_clean else clean_TE.detach(), logits_TE
                )
                mask_1T = None if mask_T is None else mask_T[None]
                means.append(mean_over_tokens(divergence_T[None], mask_1T)[0])
        if not means:
            raise ValueError("model must run its MoE layers in a forward pass, got none that ran")
        return torch.stack(means).mean()


@contextmanager
def routing_of_passes(model: nn.Module) -> Iterator[RoutingOfPasses]:
    """Keep the routers' logits of the outer passes in the block, with their graph. What
    checkpointing runs again is not kept. Compiled models run eagerly inside the block."""
    with router_logits(model, routed_layers(model)) as passes:
        yield RoutingOfPasses(model, passes)


def _check_graph(name: str, logits_TE: Tensor, weights: list[nn.Parameter]) -> None:
    """ValueError: the router trains, and its logits do not know it."""
    trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    if trains and not logits_TE.requires_grad:
        raise ValueError(
            f"router logits of {name!r} must have a graph to the router's weights, got none; "
            "checkpointing must have use_reentrant=False"
        )
