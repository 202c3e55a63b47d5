"""An alarm for routers that collapse: one expert takes all tokens, most experts get none, or the
router is no longer finite.

It has counters of its own: ``RouterHealth`` tells neither the share of tokens that an expert serves
nor K, and what it says of logits leaves weights out.

Shape suffixes: T tokens, K choices, E experts.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks.training.checks import check_count
from ironmoe.attacks.training.guards.non_finite import NonFiniteLoss, first_non_finite_layer
from ironmoe.attacks.user_warning import warn_user
from ironmoe.kernels import Routing
from ironmoe.kernels.route import transformed
from ironmoe.kernels.topk import NaNLogits
from ironmoe.moe.routing.callbacks import counting
from ironmoe.moe.routing.routed_layers import Decision, RoutedLayer, routing_sites
from ironmoe.moe.sharded import local_values

FEWEST_CHOICES = 2  # for each expert: with fewer, good routers leave experts without a token, too
FEWEST = 8  # in all: the few tokens of one image may be alike

ADVICE = (
    "raise the weights of the router's balance losses, lower the learning rate, or let eps grow "
    "with ramp_steps"
)


_STEERED = ContextVar("_STEERED", default=False)


@contextmanager
def steered() -> Iterator[None]:
    """Inside the block alarms count nothing: what experts get there is not the routers' choice."""
    token = _STEERED.set(True)
    try:
        yield
    finally:
        _STEERED.reset(token)


class RouterCollapseWarning(UserWarning):
    """Most experts of a layer get no token, or one gets nearly all of them."""


class NonFiniteRouter(NonFiniteLoss):
    """Weights or logits of a router are NaN or infinite. Choices of such a router mean nothing: a
    comparison with NaN may send all tokens to expert 0, with a loss that looks sound.

    layer: the name of the MoE layer; step: the number of the batch, from 0
    """

    def __init__(self, layer: str, step: int, what: str) -> None:
        self.layer = layer
        self.step = step
        RuntimeError.__init__(
            self,
            f"the router of {layer!r} must be finite, got {what} that are not at step {step}. The "
            "weights are still those before this update: go back to earlier ones, and take a lower "
            "learning rate, or clip gradients",
        )


@contextmanager
def explaining_nan(model: nn.Module, ask: Callable[[], object], step: int) -> Iterator[None]:
    """Routers of this library refuse NaN on CPU, in any pass. Inside the block that is a
    NonFiniteRouter, or a NonFiniteLoss where the router's weights are finite. ``ask`` runs the
    model on the images of this step."""
    try:
        yield
    except NaNLogits as error:
        for name, layer in routing_sites(model).items():
            if bool(_non_finite_weights(layer)):
                raise NonFiniteRouter(name, step, "weights") from error
        raise NonFiniteLoss(first_non_finite_layer(model, ask), step, math.nan) from error


class RouterLoad(NamedTuple):
    """What one layer did in a step.

    largest_load: the share of tokens that the busiest expert serves
    dormant: how many experts got no token
    num_experts: E; top_k: K
    choices: how many choices of tokens were carried out
    """

    largest_load: float
    dormant: int
    num_experts: int
    top_k: int
    choices: int


class CollapseAlarm:
    """Looks at the routers in the outer passes of every ``every``-th step; inner attacks are not
    counted. The host waits for the device in such a step, and in no other. The method also reads
    its loss then, whatever the model. The first look comes after ``every`` steps, since a router
    may have a favourite expert before it was trained.

    It gives each warning once for each layer, until a later look finds the layer recovered. Where
    parts of a batch go through the model in turns, it looks at all that came so far in this step.
    There is no warning of loads as long as a layer carried out fewer than 2 choices for each
    expert, or fewer than 8 in all.

    Compiled models run eagerly in these outer passes, because compiled code does not count choices.
    Each process looks at its own tokens.

    Args:
        every: steps from one look to the next.
        dormant: warn if more than this share of a layer's experts got no token.
        load: warn if one expert serves more than this share of all tokens, where E > K.

    Raises:
        ValueError: an argument that is none of these.
        NonFiniteRouter: in ``watching``, weights or logits of a router are NaN or infinite.

    Warns:
        RouterCollapseWarning: in ``watching``.
    """

    def __init__(self, every: int = 50, *, dormant: float = 0.5, load: float = 0.9) -> None:
        check_count(every=every)
        for name, share in (("dormant", dormant), ("load", load)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        self.every = int(every)
        self.dormant = float(dormant)
        self.load = float(load)
        self._last: dict[str, RouterLoad] = {}
        self._step: int | None = None  # of the last look
        self._sums: dict[str, Tensor] = {}  # of that step, by layer
        self._warned: dict[tuple[str, str], int] = {}  # (layer, kind) → the last step that was bad

    def looks_at(self, step: int) -> bool:
        """Whether this step, counted from 0, is an ``every``-th one."""
        return (step + 1) % self.every == 0

    @contextmanager
    def watching(self, model: nn.Module, step: int) -> Iterator[None]:
        """Around the outer passes of this step."""
        layers = routing_sites(model) if self.looks_at(step) else {}
        if not layers:
            yield
            return

        self._begin(step)
        counts = {name: _Counts(layer) for name, layer in layers.items()}
        # torch._dynamo takes seconds to import; without it nothing is compiled.
        compiles = "torch._dynamo" in sys.modules
        with torch.compiler.set_stance("force_eager") if compiles else nullcontext():
            stop = counting(layers, {name: each.add for name, each in counts.items()}, model=model)
            try:
                yield
            finally:
                stop()
        self._look(counts, step)

    def read(self) -> dict[str, RouterLoad]:
        """What the last look saw, by the layer's name; {} before the first look and for a dense
        model."""
        return dict(self._last)

    def state_dict(self) -> dict[str, Any]:
        """What a training that goes on later must know, as JSON has it."""
        warned = [[*place, step] for place, step in self._warned.items()]
        return {"step": self._step, "warned": warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was called."""
        self._step, self._sums = state["step"], {}
        self._warned = {(name, kind): step for name, kind, step in state["warned"]}

    def _begin(self, step: int) -> None:
        """Forget the sums of the step before, and the warnings of layers that recovered in it."""
        if step == self._step:
            return
        self._warned = {key: bad for key, bad in self._warned.items() if bad == self._step}
        self._step, self._sums = step, {}

    def _look(self, counts: dict[str, "_Counts"], step: int) -> None:
        ran = {name: each for name, each in counts.items() if each.sums is not None}
        if not ran:
            return
        vectors = [each.numbers() for each in ran.values()]
        lengths = [len(vector) for vector in vectors]
        together = torch.cat([vector.to(vectors[0].device) for vector in vectors]).cpu()
        numbers = dict(zip(ran, together.split(lengths), strict=True))

        for place, what in ((0, "weights"), (1, "logits")):
            for name, values in numbers.items():
                if values[place]:
                    raise NonFiniteRouter(name, step, what)
        for name, values in numbers.items():
            self._sums[name] = values + self._sums.get(name, 0)
        self._last |= {name: each.load(self._sums[name]) for name, each in ran.items()}
        for name in ran:
            self._judge(name, self._last[name], step)

    def _judge(self, name: str, load: RouterLoad, step: int) -> None:
        """Warn of what is wrong now and was not before."""
        if load.choices < max(FEWEST, FEWEST_CHOICES * load.num_experts):
            self._warned |= {key: step for key in self._warned if key[0] == name}
            return
        problems = {
            "dormant": load.dormant > self.dormant * load.num_experts
            and f"{load.dormant} of {load.num_experts} experts get no token",
            "load": load.largest_load > self.load
            and load.num_experts > load.top_k
            and f"one of {load.num_experts} experts serves {load.largest_load:.0%} of the tokens",
        }
        for kind, problem in problems.items():
            if problem and (name, kind) not in self._warned:
                message = f"the router of {name!r} collapses: at step {step} {problem}; {ADVICE}"
                warn_user(message, RouterCollapseWarning)
            if problem:
                self._warned[name, kind] = step

    def __repr__(self) -> str:
        return f"CollapseAlarm({self.every}, dormant={self.dormant:g}, load={self.load:g})"


class _Counts:
    """What one layer does, as one float64 tensor on its device: whether logits are not finite, how
    many tokens are real, and the choices carried out by each expert (E)."""

    def __init__(self, layer: RoutedLayer) -> None:
        self.layer = layer
        self.top_k = 0
        self.sums: Tensor | None = None

    @torch.no_grad()
    def add(self, decision: Decision, realised: Routing) -> None:
        if _STEERED.get() or transformed() or decision.x.is_meta:
            return
        num_experts = self.layer.num_experts
        real_T1 = realised.experts.new_ones(len(realised.experts), 1, dtype=torch.bool)
        if decision.mask is not None:
            real_T1 = decision.mask[:, None]

        kept_TK = real_T1 & (realised.experts < num_experts)
        places_R = realised.experts.long().where(kept_TK, num_experts).flatten()
        ones_R = torch.ones_like(places_R, dtype=torch.float64)
        load_E = ones_R.new_zeros(num_experts + 1).scatter_add_(0, places_R, ones_R)[:num_experts]

        bad = ones_R.new_zeros(1)
        logits_TE = decision.logits
        if logits_TE is not None and len(logits_TE) == len(real_T1):
            # −∞ rules an expert out, as in an ensemble.
            bad = (real_T1 & (logits_TE.isnan() | logits_TE.isposinf())).sum().to(ones_R)[None]

        sums = torch.cat([bad, real_T1.sum().to(ones_R)[None], load_E])
        self.sums = sums if self.sums is None else self.sums + sums
        self.top_k = max(self.top_k, decision.routing.experts.shape[1])

    def numbers(self) -> Tensor:
        """Whether weights of the router are not finite, then ``sums``."""
        assert self.sums is not None
        bad = _non_finite_weights(self.layer).to(self.sums)
        return torch.cat([bad[None], self.sums])

    def load(self, numbers: Tensor) -> RouterLoad:
        """``numbers`` in words."""
        _, _, tokens, *load_E = numbers.tolist()
        return RouterLoad(
            largest_load=max(load_E) / max(tokens, 1),
            dormant=load_E.count(0),
            num_experts=self.layer.num_experts,
            top_k=self.top_k,
            choices=int(sum(load_E)),
        )


def _non_finite_weights(layer: RoutedLayer) -> Tensor:
    """() how many weights of the layer's router are NaN or infinite; of a sharded one, those of
    this process."""
    bad = torch.zeros((), dtype=torch.int64)
    for weight in () if layer.router is None else layer.router.parameters():
        own = local_values(weight)
        bad = bad.to(own.device) + (~own.isfinite()).sum()
    return bad
