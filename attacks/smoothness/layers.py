"""What measurements look at in the routed layers of a model: their names, their decisions, and what
they give.

Shape suffixes: B images, N tokens of an image, T tokens of all images, D width of a token.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.model_errors import check_graph
from ironmoe.attacks.routing.layers import by_image, members_of
from ironmoe.attacks.smoothness.routing_held import check_reachable
from ironmoe.kernels import Routing
from ironmoe.moe.routing.callbacks import attached
from ironmoe.moe.routing.routed_layers import Decision, RoutedLayer, routing_sites


def layer_names(model: Any, layers: Any) -> list[str]:
    """The names of some routed layers of a model, in the model's order.

    Args:
        layers: names, or numbers in the model's order (negative ones count from the last); None:
            all.

    Raises:
        TypeError: ``layers`` is no sequence; the model is no nn.Module.
        ValueError: the model has no such layer.
    """
    check_reachable(model, "to see what they choose")
    names = list(routing_sites(model))
    if layers is None:
        return names
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a sequence of names or numbers, or None, got {layers!r}")

    wanted = set()
    for layer in layers:
        if isinstance(layer, int) and -len(names) <= layer < len(names):
            wanted.add(names[layer])
        elif layer in names:
            wanted.add(layer)
        else:
            raise ValueError(
                f"layers must be among {', '.join(names) or 'none, since there are none'}, or "
                f"their numbers, got {layer!r}"
            )
    return [name for name in names if name in wanted]


@contextmanager
def deciding(model: Any, names: Sequence[str]) -> Iterator[dict[str, list[Decision]]]:
    """The decisions of some layers inside the block, with their graphs."""
    seen: dict[str, list[Decision]] = {name: [] for name in names}

    def watch(decision: Decision, realised: Routing) -> None:
        seen[decision.layer].append(decision)

    if not names:
        yield seen
        return
    with attached(routing_sites(model), {}, dict.fromkeys(names, watch), model=model):
        yield seen


@contextmanager
def layer_outputs(model: Any, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """name → what the layer gives inside the block, (T, D) a pass, with its graph."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keeper(name: str) -> Callable[[Any, Any, Any], Tensor]:
        def keep(_: Any, __: Any, output: Tensor) -> Tensor:
            rows = output.flatten(0, -2)
            outputs[name].append(rows)
            return rows.view_as(output)  # so that what follows depends on the rows that are kept

        return keep

    sites = routing_sites(model) if names else {}
    handles = [sites[name].module.register_forward_hook(keeper(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def output_weights(logits: Tensor, outputs: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """name → (T, D), by how much a sum of logits that is like no other changes with the outputs of
    the layer.

    Raises:
        ValueError: a layer gives its output without a graph.
    """
    ran = {name: rows[0] for name, rows in outputs.items() if rows}
    if not ran:
        return {}
    for name, rows in ran.items():
        if not rows.requires_grad:
            raise ValueError(
                f"layers must have outputs with a graph, got {name!r}, which runs under no_grad, "
                "as under checkpoint(…, use_reentrant=True)"
            )
    number = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype)
    raised = (logits * (1 + number).cos()).sum()
    check_graph(raised)
    grads = torch.autograd.grad(raised, list(ran.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(rows) if grad is None else grad
        for (name, rows), grad in zip(ran.items(), grads, strict=True)
    }


def token_matters(weights: Tensor, images: int, site: RoutedLayer) -> Tensor:
    """(B, N) bool: a logit depends on the output of the layer for this token. Under a capacity a
    token may also take the place of another one."""
    does = by_image(weights.ne(0).any(1), images, members_of(site))
    if getattr(site.module, "capacity", None) is not None:
        does = does.any(1, keepdim=True).expand_as(does)
    return does
