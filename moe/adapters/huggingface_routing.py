"""Where a Hugging Face model routes tokens: its Experts modules, the router beside each, and the
logits in what a router returns.

Only attributes are looked at, so it works whichever experts implementation runs, and transformers
is not imported.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.moe.routers.wrapped import WRAPPERS

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts", "config")
_ROUTERS = ("gate", "router")  # a parent block calls it one or the other


class ExpertSite(NamedTuple):
    """One MoE layer: the name of its Experts module in the model, that module, the router beside it
    (None if there is none known), and E, which under expert parallelism counts this process's
    experts."""

    name: str
    experts: nn.Module
    router: nn.Module | None
    num_experts: int


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' ``use_experts_implementation`` made this module: its flags are
    attributes of the instance itself."""
    return all(name in vars(module) for name in _INTERFACE)


def expert_sites(model: nn.Module) -> Iterator[ExpertSite]:
    """Every Experts module of the model, in the model's order, each once."""
    for name, module in model.named_modules():
        if is_experts(module):
            yield ExpertSite(name, module, _router_beside(model, name), module.num_experts)


def _router_beside(model: nn.Module, name: str) -> nn.Module | None:
    """The child called gate or router of the block that owns the Experts module; wrappers around
    the latter are no blocks."""
    path = name.split(".")
    while path and (path[-1] in WRAPPERS or path[-2:-1] == ["modules_to_save"]):
        path = path[:-1] if path[-1] in WRAPPERS else path[:-2]  # the copies that PEFT keeps
    if path in ([], [""]):  # the model is the Experts module itself
        return None
    block = model.get_submodule(".".join(path[:-1]))
    return next((child for name, child in block.named_children() if name in _ROUTERS), None)


def router_logits(output: Any, num_experts: int) -> Tensor | None:
    """The router's logits (T, E), in its dtype, out of what a router module returned; None where
    that does not hold them.

    A router returns the logits alone (a linear layer), or (logits, weights, indices, …), or, as
    Granite did until transformers 5.17, (indices, weights, logits). Logits are what the family
    itself turns into scores by softmax or sigmoid: after Laguna's soft cap and Muse Spark's scale,
    before correction biases and groups. None for Gemma 4, whose router returns the softmax in their
    place (rows ≥ 0 with sum 1 are no logits), and for Zaya, which has one more class than experts.
    Looks at values, so on a GPU it waits for them.
    """
    return logits_if_known(logits_or_scores(output, num_experts))


def logits_or_scores(output: Any, num_experts: int) -> Tensor | None:
    """As ``router_logits``, without a look at values: Gemma 4's (T, E) are its softmax."""
    tensors = (
        [output]
        if isinstance(output, Tensor)
        else [item for item in output if isinstance(item, Tensor)]
    )
    if not tensors:
        return None
    logits = tensors[0] if tensors[0].is_floating_point() else tensors[-1]
    if not logits.is_floating_point() or logits.ndim < 2 or logits.shape[-1] != num_experts:
        return None
    return logits.flatten(0, -2)


def logits_if_known(logits_TE: Tensor | None) -> Tensor | None:
    """These logits; None if they are probabilities."""
    if logits_TE is None or not len(logits_TE):
        return logits_TE
    return None if bool(are_probabilities(logits_TE.detach()).all()) else logits_TE


def are_probabilities(scores_TE: Tensor) -> Tensor:
    """(T,) bool: the row is ≥ 0 and its sum is 1."""
    sums_T = scores_TE.sum(-1, dtype=torch.float32)
    return (scores_TE >= 0).all(-1) & ((sums_T - 1).abs() < 0.02)
