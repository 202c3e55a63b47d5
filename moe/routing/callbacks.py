"""A way to look at the decisions of routed layers and to replace them.

All callbacks of a layer share its hooks and run in this order: every edit, as they came; the
capacity, if there is one; every final edit; every watcher; every counter. So a trace sees what an
intervention made.

A forward that activation checkpointing repeats in the backward pass is steered as the first one
was, and is not seen again. A masked token is no token: whatever an edit gives it is taken away.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ironmoe.kernels import Routing
from ironmoe.kernels.route import recomputing
from ironmoe.moe.adapters.huggingface_routing import logits_if_known, logits_or_scores
from ironmoe.moe.adapters.token_mask import current_token_mask, keep_token_masks
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.masks import without_masked
from ironmoe.moe.routers.top_k import RouterOutput, TopKRouter
from ironmoe.moe.routers.wrapped import unwrapped
from ironmoe.moe.routing.routed_layers import Decision, Edit, RoutedLayer, Watch


@contextmanager
def attached(
    layers: Mapping[str, RoutedLayer],
    edits: Mapping[str, Edit],
    watchers: Mapping[str, Watch],
    final_edits: Mapping[str, Edit] | None = None,
    *,
    model: nn.Module | None = None,
) -> Iterator[None]:
    """Run these callbacks, by name of layer, on every forward inside the block. A final edit sees,
    and replaces, the routing that is carried out, after any capacity. Compiled code knows nothing
    of hooks, so inside the block torch.compile stands aside and everything runs eagerly.

    model: around the layers; the attention mask of a Hugging Face model is their mask.
    """
    callbacks: dict[str, Mapping[str, Callable[..., Any]]] = {
        "edits": edits,
        "watchers": watchers,
        "final_edits": final_edits or {},
    }
    with torch.compiler.set_stance("force_eager"):
        leave = _joined(layers, callbacks, model)
        try:
            yield
        finally:
            leave()


def counting(
    layers: Mapping[str, RoutedLayer], counters: Mapping[str, Watch], *, model: nn.Module
) -> Callable[[], None]:
    """Run these counters, by name of layer, on every forward until the function returned here is
    called. A counter is a watcher that torch.compile can trace and that never waits for a GPU, so
    compiled models keep running as compiled code; what was compiled before knows no counter. The
    logits of a Hugging Face router come to it unchecked: they may be probabilities."""
    return _joined(layers, {"counters": counters}, model)


def has_callbacks(layer: nn.Module) -> bool:
    """Whether a callback is on the decisions of this layer now."""
    return layer in _IN_USE


def _joined(
    layers: Mapping[str, RoutedLayer],
    callbacks: Mapping[str, Mapping[str, Callable[..., Any]]],
    model: nn.Module | None,
) -> Callable[[], None]:
    """Start to run these callbacks, by kind and by name of layer; what is returned stops it."""
    joined = [
        (_station_of(layers[name]), kind, callback)
        for kind, by_layer in callbacks.items()
        for name, callback in by_layer.items()
    ]
    for station, kind, callback in joined:
        station.join(kind, callback)
    handles = [] if model is None else keep_token_masks(model)

    def leave() -> None:
        for handle in handles:
            handle.remove()
        for station, kind, callback in joined:
            station.leave(kind, callback)

    return leave


class _Station:
    """The hooks of one layer. They exist while a callback uses them."""

    def __init__(self, layer: RoutedLayer) -> None:
        self.layer = layer
        self.edits: list[Edit] = []
        self.final_edits: list[Edit] = []
        self.watchers: list[Watch] = []
        self.counters: list[Watch] = []
        self.handles: list[RemovableHandle] = []
        # Whether this MoE's forward runs: its router and its capacity may serve other layers, too.
        self.inside = False
        self.mask: Tensor | None = None  # of this forward; not every router is told
        self.pending: Decision | None = None  # between an MoE's router and its capacity
        self.logits: Tensor | None = None  # between a Hugging Face router and its experts

    def __reduce__(self) -> Any:
        """A copy or a pickle of a model leaves its callbacks behind: this one has none."""
        return _Station, (RoutedLayer("", nn.Identity(), None, 0),)

    def join(self, kind: str, callback: Callable[..., Any]) -> None:
        if not self.handles:
            self.handles = list(self._hooks())
        getattr(self, kind).append(callback)

    def leave(self, kind: str, callback: Callable[..., Any]) -> None:
        getattr(self, kind).remove(callback)
        if not (self.edits or self.final_edits or self.watchers or self.counters):
            for handle in self.handles:
                handle.remove()
            self.handles = []
            _IN_USE.pop(self.layer.module, None)

    def busy(self) -> bool:
        """Whether this forward concerns a callback. One that the backward pass repeats concerns
        those alone that steer."""
        steers = bool(self.edits or self.final_edits)
        return steers or (bool(self.watchers or self.counters) and not recomputing())

    def decide(self, decision: Decision) -> Decision:
        for edit in self.edits:
            decision = decision._replace(routing=_steered(edit, decision))
        return decision

    def finish(self, decision: Decision, realised: Routing) -> Routing:
        """The routing that is carried out. realised: what the capacity left of the decision."""
        for edit in self.final_edits:
            realised = _steered(edit, decision._replace(routing=realised))
        if recomputing():
            return realised
        if decision.mask is None and not isinstance(self.layer.module, MoE):
            # An edit must do in the backward pass what it did here, and no mask is known there.
            decision = decision._replace(mask=_attention_mask(decision.x, checkpointed=True))
        for see in (*self.watchers, *self.counters):
            see(decision, realised)
        return realised

    def _hooks(self) -> Iterator[RemovableHandle]:
        module, router = self.layer.module, self.layer.router
        if isinstance(module, MoE):
            yield module.register_forward_pre_hook(self._enter, with_kwargs=True)
            # also after an exception
            yield module.register_forward_hook(self._exit, always_call=True)
            yield module.router.register_forward_hook(self._after_router)
            if module.capacity is not None:
                yield module.capacity.register_forward_hook(self._after_capacity)
            return
        if router is not None:
            yield router.register_forward_hook(self._keep_logits)
        yield module.register_forward_pre_hook(self._before_experts, with_kwargs=True)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inside = self.busy()
        self.mask = mask_of(args, kwargs)

    def _exit(self, _: nn.Module, __: object, ___: object) -> None:
        self.inside = False
        self.mask = None
        self.pending = None

    def _after_router(
        self, router: nn.Module, args: tuple[Any, ...], output: RouterOutput
    ) -> RouterOutput:
        if not self.inside:
            return output
        rule = unwrapped(router)
        decision = self.decide(
            Decision(
                self.layer.name,
                output.routing,
                output.logits,
                args[0],
                self.layer.num_experts,
                rule.gates_of if isinstance(rule, TopKRouter) else None,
                self.mask,
            )
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
        if self.busy():
            self.logits = logits_or_scores(output, self.layer.num_experts)

    def _before_experts(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.busy():
            return None
        # Families name the last two arguments differently, but have one order.
        x_TD, experts_TK, gates_TK = (*args, *kwargs.values())
        routing = Routing(gates_TK, experts_TK.to(torch.int32))
        logits, self.logits = self.logits, None
        if self.edits or self.final_edits or self.watchers:  # a counter must not wait for values
            logits = logits_if_known(logits)
        mask_T = _attention_mask(x_TD)
        decision = self.decide(
            Decision(self.layer.name, routing, logits, x_TD, self.layer.num_experts, None, mask_T)
        )
        realised = self.finish(decision, decision.routing)
        if realised is routing:
            return None
        # Not every implementation accepts expert E, so a dropped choice becomes expert 0 of gate 0.
        dropped_TK = realised.experts >= self.layer.num_experts
        experts_TK = realised.experts.masked_fill(dropped_TK, 0).to(experts_TK.dtype)
        return (x_TD, experts_TK, realised.gates.masked_fill(dropped_TK, 0).to(gates_TK.dtype)), {}


def _steered(edit: Edit, decision: Decision) -> Routing:
    """What the edit makes of a decision. It cannot bring a masked token back."""
    routing = edit(decision)
    if decision.mask is None or routing is decision.routing:
        return routing
    return without_masked(routing, decision.mask, decision.num_experts)


def _attention_mask(x_TD: Tensor, *, checkpointed: bool = False) -> Tensor | None:
    mask_T = current_token_mask(len(x_TD), checkpointed=checkpointed)
    return None if mask_T is None else mask_T.to(x_TD.device)


def mask_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask (T,) bool that an MoE layer is called with: the second argument after x."""
    mask = args[1] if len(args) > 1 else kwargs.get("mask")
    return (mask != 0).flatten() if isinstance(mask, Tensor) else None


# A module's hooks hold its station; this table must keep neither alive.
_IN_USE: WeakKeyDictionary[nn.Module, "ref[_Station]"] = WeakKeyDictionary()


def _station_of(layer: RoutedLayer) -> _Station:
    known = _IN_USE.get(layer.module)
    station = known() if known else None
    if station is None:
        station = _Station(layer)
        _IN_USE[layer.module] = ref(station)
    return station
