"""Routing modes: what the search of an attack does to routing, as in
``PGD(model, routing=FrozenRouting())``.

The model of the search differs from the free one in its forward pass (``FrozenRouting``,
``Softened``), in its backward pass alone (``GatesOnly``, ``ExpertsOnly``, ``StraightThrough``), or
in its loss (``AuxiliaryLoss``, ``RoutingDivergence``). The free model predicts again whatever the
search finds: ``found`` of a result says that the search saw a success, ``success`` says that the
prediction confirmed it.

The modes work on the layers of this library, upcycled models, ensembles, and Hugging Face models.
All images of a batch must have the same number of tokens. ``AuxiliaryLoss`` alone makes the loss of
one image depend on the others.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.engine.routing_mode import RoutingMode, Term
from ironmoe.attacks.routing.auxiliary_loss import AuxiliaryLoss
from ironmoe.attacks.routing.divergence import RoutingDivergence
from ironmoe.attacks.routing.layers import (
    by_image,
    by_token,
    known_logits,
    members_of,
    one_pass,
    routed_layers,
)
from ironmoe.kernels import Routing
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.expert_choice import ExpertChoiceRouter
from ironmoe.moe.routers.wrapped import unwrapped
from ironmoe.moe.routing.callbacks import attached, mask_of
from ironmoe.moe.routing.gate_policies import FrozenGates
from ironmoe.moe.routing.gates import gates_for
from ironmoe.moe.routing.intervene import intervene
from ironmoe.moe.routing.ranks import ranking
from ironmoe.moe.routing.routed_layers import Decision, RoutedLayer
from ironmoe.moe.routing.trace import trace_routing

__all__ = [
    "AuxiliaryLoss",
    "ExpertsOnly",
    "FrozenRouting",
    "GatesOnly",
    "RoutingDivergence",
    "Softened",
    "StraightThrough",
]


@dataclass(frozen=True)
class FrozenRouting(RoutingMode):
    """Every token keeps the experts it had in the clean image, drops included (arXiv 2210.10253
    asks how much of an attack's effect comes from routing). Costs one more forward pass for each
    attempt.

    gates: "recorded": constants, those of the clean image, so that the attack works on the experts
        alone; "fresh": those the router gives these experts now, so that it can move weights too.
        "fresh" needs routers of this library's top-k family.
    """

    gates: str = "recorded"
    free_forward = False

    def __post_init__(self) -> None:
        if self.gates not in ("recorded", "fresh"):
            raise ValueError(f'gates must be "recorded" or "fresh", got {self.gates!r}')

    @torch.no_grad()
    def record(
        self, model: nn.Module, clean: Tensor, ask: Callable[[Tensor], object] | None = None
    ) -> Attempts:
        layers = routed_layers(model)
        with trace_routing(model) as trace:
            (ask or model)(clean)

        # The pass just made counts.
        attempts = {"forwards": torch.ones(len(clean), dtype=torch.int64, device=clean.device)}
        for number, (name, layer) in enumerate(trace.layers.items()):
            if not layer.routings:  # it did not run
                continue
            # with padding, so that every image has as many tokens
            carried_out = one_pass(name, layer.routings)
            values = {
                "experts": carried_out.experts,
                "gates": carried_out.gates,
                "chosen": one_pass(name, layer.all_intended).experts,
            }
            for key in ("experts", "gates" if self.gates == "recorded" else "chosen"):
                attempts[f"routing.{number}.{key}"] = by_image(
                    values[key], len(clean), members_of(layers[name])
                )
        return attempts

    @contextmanager
    def around(self, model: nn.Module, attempts: Attempts) -> Iterator[Term | None]:
        layers = routed_layers(model)
        numbers = {name: number for number, name in enumerate(layers)}

        def replay(decision: Decision) -> Routing:
            def recorded(key: str) -> Tensor:
                return by_token(
                    attempts[f"routing.{numbers[decision.layer]}.{key}"],
                    members_of(layers[decision.layer]),
                )

            experts_TK = recorded("experts")
            if self.gates == "recorded":
                return Routing(recorded("gates").to(decision.routing.gates.dtype), experts_TK)
            if decision.gates_of is None:
                raise ValueError(
                    f'gates="fresh" needs the rule by which the router of {decision.layer!r} '
                    "makes gates, which it does not tell; "
                    'use gates="recorded"'
                )
            # Gates of a choice are made before a capacity drops some of it.
            gates_TK = gates_for(decision, recorded("chosen"), "own", decision.logits)
            return Routing(gates_TK.masked_fill(experts_TK == decision.num_experts, 0), experts_TK)

        with intervene(model, replay):
            yield None


@dataclass(frozen=True)
class ExpertsOnly(RoutingMode):
    """The gates of MoE layers are constants of the backward pass: the gradient flows through what
    experts make of their tokens, and around the layers. The forward pass is the true one."""

    @contextmanager
    def around(self, model: nn.Module, attempts: Attempts) -> Iterator[Term | None]:
        layers = routed_layers(model)
        with attached(layers, dict.fromkeys(layers, FrozenGates()), {}, model=model):
            yield None


@dataclass(frozen=True)
class GatesOnly(RoutingMode):
    """The tokens that experts get are constants of the backward pass: the gradient flows through
    the gates, and around the layers. The forward pass is the true one.

    In one layer its gradient and that of ``ExpertsOnly`` add up to the full one. The shared expert
    of an ``MoE`` counts as an expert; that of a Hugging Face block lies outside its Experts module
    and keeps its gradient in both modes."""

    @contextmanager
    def around(self, model: nn.Module, attempts: Attempts) -> Iterator[Term | None]:
        with ExitStack() as stack:
            # compiled code knows nothing of hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for site in routed_layers(model).values():
                for handle in _without_expert_gradient(site):
                    stack.callback(handle.remove)
            yield None


@dataclass(frozen=True)
class StraightThrough(RoutingMode):
    """The forward pass routes as the model does. The backward pass is that of a model in which
    s · softmax(logits / temperature) weighs all experts, where s is the sum of the token's gates, a
    constant: backward pass differentiable approximation (BPDA, Athalye et al., arXiv 1802.00420).

    A gate of 0 has a gradient here: it says what another expert would make of the token. So the
    attack sees where routing could go, also where a router hides it (one expert by argmax, constant
    gates). All E experts run, which costs E / K times the forward pass.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    @contextmanager
    def around(self, model: nn.Module, attempts: Attempts) -> Iterator[Term | None]:
        with _after_capacity(model, self._routing):
            yield None

    def _routing(self, decision: Decision, sum_T1: Tensor) -> Routing:
        experts_TE, soft_TE = _soft_choice(decision, sum_T1, self.temperature)
        gates_TK, experts_TK = decision.routing
        nothing = soft_TE.new_zeros(len(gates_TK), decision.num_experts + 1)  # the last: dropped
        hard_TE = nothing.scatter_add(
            1, experts_TK.long(), gates_TK.detach().to(soft_TE.dtype)
        ).gather(1, experts_TE.long())
        return Routing(hard_TE + (soft_TE - soft_TE.detach()), experts_TE)


@dataclass(frozen=True)
class Softened(RoutingMode):
    """In both passes s · softmax(logits / temperature) weighs all experts. s is a constant: the sum
    that the token's gates would have if no choice were dropped; here none is.

    The search sees a smooth model whose outputs have the scale of the true one's. High temperatures
    make it smoother, low ones bring it near top-1 routing. It resembles the true model most where
    that has softmax gates."""

    temperature: float = 1.0
    free_forward = False

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    @contextmanager
    def around(self, model: nn.Module, attempts: Attempts) -> Iterator[Term | None]:
        with _after_capacity(model, self._routing):
            yield None

    def _routing(self, decision: Decision, sum_T1: Tensor) -> Routing:
        experts_TE, soft_TE = _soft_choice(decision, sum_T1, self.temperature)
        return Routing(soft_TE, experts_TE)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")


def _soft_choice(decision: Decision, sum_T1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(experts (T, E), sum · softmax(logits / temperature) of these (T, E)). The token's own choice
    comes first and in its order, so that sums over experts round as they did. In place of experts
    that the token cannot have stand the number E and a gate of 0."""
    logits_TE = known_logits(decision)
    experts_TE = ranking(decision)
    soft_TE = torch.nn.functional.pad(
        sum_T1.to(logits_TE) * (logits_TE / temperature).softmax(-1), (0, 1)
    )
    return experts_TE.to(torch.int32), soft_TE.gather(1, experts_TE.long())


@contextmanager
def _after_capacity(
    model: nn.Module, edit: Callable[[Decision, Tensor], Routing]
) -> Iterator[None]:
    """Inside the block all layers carry out what ``edit`` makes of a decision and of its sums of
    gates. No capacity drops any of it."""
    layers = routed_layers(model)
    sums: dict[str, Tensor] = {}

    def before(decision: Decision) -> Routing:
        sums[decision.layer] = _undropped_sum(layers[decision.layer].module, decision.routing)
        return decision.routing

    def after(decision: Decision) -> Routing:
        return edit(decision, sums.pop(decision.layer))

    befores, afters = dict.fromkeys(layers, before), dict.fromkeys(layers, after)
    with attached(layers, befores, {}, afters, model=model):
        yield


def _undropped_sum(layer: nn.Module, routing: Routing) -> Tensor:
    """(T, 1) what the gates of a token would add up to if no choice were dropped, in at least
    float32; constants."""
    gates_TK = routing.gates.detach().to(torch.promote_types(routing.gates.dtype, torch.float32))
    if isinstance(layer, MoE):
        router = unwrapped(layer.router)
        capacity = None if layer.capacity is None else unwrapped(layer.capacity)
        expert_choice = isinstance(router, ExpertChoiceRouter)  # every expert, by its softmax
        if expert_choice or getattr(capacity, "renormalize", False):
            return torch.ones_like(gates_TK[:, :1])
    return gates_TK.sum(1, keepdim=True)


def _without_expert_gradient(site: RoutedLayer) -> Iterator[RemovableHandle]:
    """Hooks that detach the tokens on their way to the experts and not to the router."""
    if not isinstance(site.module, MoE):
        yield site.module.register_forward_pre_hook(_detach_first, with_kwargs=True)
        return
    tokens: list[Tensor] = []  # with their graph, between the layer and its router

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *_ = (*args, *kwargs.values())
        mask_T = mask_of(args, kwargs)
        x_TD = x.reshape(-1, x.shape[-1])
        tokens[:] = [x_TD if mask_T is None else x_TD.masked_fill(~mask_T[:, None], 0)]
        return _detach_first(layer, args, kwargs)

    def put_back(_: nn.Module, args: tuple[Any, ...]) -> Any:
        # A router may serve several layers, so there may be no tokens of this one.
        return (tokens.pop(), *args[1:]) if tokens else None

    yield site.module.register_forward_pre_hook(keep, with_kwargs=True)
    yield site.module.router.register_forward_pre_hook(put_back)


def _detach_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Model families name the further arguments differently, but give them in one order.
    tokens, *others = (*args, *kwargs.values())
    return (tokens.detach(), *others), {}
