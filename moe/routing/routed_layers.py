"""The places of a model where tokens are routed, and what is decided there.

A routed layer is an ``MoE`` layer, or the experts of a Hugging Face model.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ironmoe.kernels import Routing
from ironmoe.kernels.checks import check_module
from ironmoe.moe.adapters.huggingface_routing import expert_sites
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.wrapped import WRAPPERS, unwrapped


class Decision(NamedTuple):
    """What a router chose for the tokens of one forward pass.

    layer:       name of the routed layer
    routing:     gates (T, K) and experts (T, K), before any capacity
    logits:      (T, E), or None where a Hugging Face router does not give them
    x:           (T, D), the tokens
    num_experts: E
    gates_of:    (logits (T, E), experts (T, K′)) → the gates this router would give them; None
        where its rule is not known
    mask:        (T,) bool, False for padding; None where every token is real
    """

    layer: str
    routing: Routing
    logits: Tensor | None
    x: Tensor
    num_experts: int
    gates_of: Callable[[Tensor, Tensor], Tensor] | None
    mask: Tensor | None = None


Edit = Callable[[Decision], Routing]
# Its second argument is the routing that is carried out: after edits and capacity.
Watch = Callable[[Decision, Routing], None]


class RoutedLayer(NamedTuple):
    """A routed layer: its name in the model, its module, the module that decides, E."""

    name: str
    module: nn.Module
    router: nn.Module | None
    num_experts: int


def routing_sites(model: nn.Module) -> dict[str, RoutedLayer]:
    """All routed layers by name, in the model's order, each once. Layers inside wrappers
    (torch.compile, checkpointing, DDP, FSDP, PEFT) have the names they had before; of the copies
    that PEFT keeps of a module, the one it calls is listed.

    Raises:
        TypeError: the model is no module.
    """
    check_module(model)
    names = {module: name for name, module in _named_modules(model, "", set())}
    found = [
        RoutedLayer(name, module, module.router, module.num_experts)
        for module, name in names.items()
        if isinstance(module, MoE)
    ]
    found += [
        RoutedLayer(*site)._replace(name=names[site.experts])
        for site in expert_sites(model)
        if site.experts in names
    ]
    return {layer.name: layer for layer in found}


def _named_modules(
    module: nn.Module, name: str, seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are called, each once, by the names they have without wrappers."""
    if module in seen:
        return
    seen.add(module)
    yield name, module

    children = dict(module.named_children())
    if "modules_to_save" in children and "original_module" in children:
        yield from _named_modules(unwrapped(module), name, seen)
        return
    is_peft = type(module).__module__.startswith("peft.")  # the model, whose children have no names
    for step, child in children.items():
        # A user's model may have an attribute called module, among others.
        wraps = step in WRAPPERS and (step != "module" or len(children) == 1)
        wraps = wraps or (is_peft and step in ("base_model", "model"))
        below = name if wraps else f"{name}.{step}".lstrip(".")
        yield from _named_modules(child, below, seen)
