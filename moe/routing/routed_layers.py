"""The places of a model where tokens are routed, and a way to look at each decision and to replace
it.

A routed layer is an ``MoE`` layer, or the experts of a Hugging Face model. All callbacks of a layer
share its hooks and run in this order: every edit, as they came; the capacity, if there is one;
every final edit; every watcher. So a trace sees what an intervention made.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ironmoe.kernels import Routing
from ironmoe.moe.adapters.huggingface_routing import expert_sites, router_logits
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.top_k import RouterOutput, TopKRouter


class Decision(NamedTuple):
    """What a router chose for the tokens of one forward pass.

    layer:       name of the routed layer
    routing:     gates (T, K) and experts (T, K), before any capacity
    logits:      (T, E), or None where a Hugging Face router does not give them
    x:           (T, D), the tokens
    num_experts: E
    gates_of:    (logits (T, E), experts (T, K′)) → the gates this router would give them; None
        where its rule is not known
    """

    layer: str
    routing: Routing
    logits: Tensor | None
    x: Tensor
    num_experts: int
    gates_of: Callable[[Tensor, Tensor], Tensor] | None


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
    """All routed layers by name, in the model's order. A compiled model's layers have the names
    they had before."""
    found = [
        RoutedLayer(name, module, module.router, module.num_experts)
        for name, module in model.named_modules()
        if isinstance(module, MoE)
    ]
    found += [RoutedLayer(*layer) for layer in expert_sites(model)]
    names = [
        ".".join(part for part in layer.name.split(".") if part != "_orig_mod") for layer in found
    ]
    return {name: layer._replace(name=name) for name, layer in zip(names, found, strict=True)}


@contextmanager
def attached(
    layers: Mapping[str, RoutedLayer],
    edits: Mapping[str, Edit],
    watchers: Mapping[str, Watch],
    final_edits: Mapping[str, Edit] | None = None,
) -> Iterator[None]:
    """Run these callbacks, by name of layer, on every forward inside the block. A final edit sees,
    and replaces, the routing that is carried out, after any capacity. Compiled code knows nothing
    of hooks, so inside the block torch.compile stands aside and everything runs eagerly."""
    finals = final_edits or {}
    stations = {
        name: _IN_USE.get(layers[name].module) or _Station(layers[name])
        for name in {*edits, *watchers, *finals}
    }
    with torch.compiler.set_stance("force_eager"):
        for name, station in stations.items():
            station.join(edits.get(name), watchers.get(name), finals.get(name))
        try:
            yield
        finally:
            for name, station in stations.items():
                station.leave(edits.get(name), watchers.get(name), finals.get(name))


class _Station:
    """The hooks of one layer. They exist while a callback uses them."""

    def __init__(self, layer: RoutedLayer) -> None:
        self.layer = layer
        self.edits: list[Edit] = []
        self.final_edits: list[Edit] = []
        self.watchers: list[Watch] = []
        self.handles: list[RemovableHandle] = []
        # Whether this MoE's forward runs: its router and its capacity may serve other layers, too.
        self.inside = False
        self.pending: Decision | None = None  # between an MoE's router and its capacity
        self.logits: Tensor | None = None  # between a Hugging Face router and its experts

    def join(self, edit: Edit | None, watch: Watch | None, final: Edit | None) -> None:
        if not self.handles:
            _IN_USE[self.layer.module] = self
            self.handles = list(self._hooks())
        self.edits += [edit] if edit else []
        self.watchers += [watch] if watch else []
        self.final_edits += [final] if final else []

    def leave(self, edit: Edit | None, watch: Watch | None, final: Edit | None) -> None:
        if edit:
            self.edits.remove(edit)
        if watch:
            self.watchers.remove(watch)
        if final:
            self.final_edits.remove(final)
        if not self.edits and not self.watchers and not self.final_edits:
            for handle in self.handles:
                handle.remove()
            self.handles = []
            _IN_USE.pop(self.layer.module, None)

    def decide(self, decision: Decision) -> Decision:
        for edit in self.edits:
            decision = decision._replace(routing=edit(decision))
        return decision

    def finish(self, decision: Decision, realised: Routing) -> Routing:
        """The routing that is carried out. realised: what the capacity left of the decision."""
        for edit in self.final_edits:
            realised = edit(decision._replace(routing=realised))
        for watcher in self.watchers:
            watcher(decision, realised)
        return realised

    def _hooks(self) -> Iterator[RemovableHandle]:
        module, router = self.layer.module, self.layer.router
        if isinstance(module, MoE):
            yield module.register_forward_pre_hook(self._enter)
            # also after an exception
            yield module.register_forward_hook(self._exit, always_call=True)
            yield module.router.register_forward_hook(self._after_router)
            if module.capacity is not None:
                yield module.capacity.register_forward_hook(self._after_capacity)
            return
        if router is not None:
            yield router.register_forward_hook(self._keep_logits)
        yield module.register_forward_pre_hook(self._before_experts, with_kwargs=True)

    def _enter(self, _: nn.Module, __: object) -> None:
        self.inside = True

    def _exit(self, _: nn.Module, __: object, ___: object) -> None:
        self.inside = False
        self.pending = None

    def _after_router(
        self, router: nn.Module, args: tuple[Any, ...], output: RouterOutput
    ) -> RouterOutput:
        if not self.inside:
            return output
        gates_of = router.gates_of if isinstance(router, TopKRouter) else None
        name, num_experts = self.layer.name, self.layer.num_experts
        decision = self.decide(
            Decision(name, output.routing, output.logits, args[0], num_experts, gates_of)
        )
        routing = decision.routing
        if self.layer.module.capacity is None:
            routing = self.finish(decision, routing)
        else:
            self.pending = decision
        changed = routing is not output.routing
        return output._replace(routing=routing, dispatch=None if changed else output.dispatch)

    def _after_capacity(self, _: nn.Module, __: object, realised: Routing) -> Routing:
        if self.pending is None:  # it is another layer's turn
            return realised
        decision, self.pending = self.pending, None
        return self.finish(decision, realised)

    def _keep_logits(self, _: nn.Module, __: object, output: object) -> None:
        self.logits = router_logits(output, self.layer.num_experts)

    def _before_experts(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Families name the last two arguments differently, but have one order.
        x_TD, experts_TK, gates_TK = (*args, *kwargs.values())
        routing = Routing(gates_TK, experts_TK.to(torch.int32))
        decision = self.decide(
            Decision(self.layer.name, routing, self.logits, x_TD, self.layer.num_experts, None)
        )
        self.logits = None
        realised = self.finish(decision, decision.routing)
        if realised is routing:
            return None
        # Not every implementation accepts expert E, so a dropped choice becomes expert 0 of gate 0.
        dropped_TK = realised.experts >= self.layer.num_experts
        experts_TK = realised.experts.masked_fill(dropped_TK, 0).to(experts_TK.dtype)
        return (x_TD, experts_TK, realised.gates.masked_fill(dropped_TK, 0).to(gates_TK.dtype)), {}


_IN_USE: WeakKeyDictionary[nn.Module, _Station] = WeakKeyDictionary()
