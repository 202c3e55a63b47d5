"""See where tokens go: record the routing of every MoE layer during forward passes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ironmoe.kernels import Routing
from ironmoe.moe.routing.callbacks import attached
from ironmoe.moe.routing.routed_layers import Decision, Watch, routing_sites


@dataclass
class LayerTrace:
    """The routing of one layer, real tokens of all traced forwards one after another: masked ones
    (padding) are left out.

    gates, experts: (T, K) each, what was carried out; ``experts == E`` marks a dropped choice,
        whose gate is 0
    intended: Routing before the capacity dropped anything; the same as the above without one
    logits: (T, E), of the router, without noise
    inputs: (T, D), the tokens, if they were asked for
    mask: which of the tokens are real, padding counted; the lists hold all of them
    """

    num_experts: int
    routings: list[Routing] = field(default_factory=list)
    all_intended: list[Routing] = field(default_factory=list)
    all_logits: list[Tensor | None] = field(default_factory=list)
    all_inputs: list[Tensor] = field(default_factory=list)
    all_masks: list[Tensor | None] = field(default_factory=list)

    @property
    def gates(self) -> Tensor:
        return self._real([routing.gates for routing in self.routings])

    @property
    def experts(self) -> Tensor:
        return self._real([routing.experts for routing in self.routings])

    @property
    def intended(self) -> Routing:
        return Routing(
            self._real([routing.gates for routing in self.all_intended]),
            self._real([routing.experts for routing in self.all_intended]),
        )

    @property
    def mask(self) -> Tensor:
        """(T′,) bool: which of the T′ tokens that the layer got, padding counted, are real."""
        return torch.cat(
            [
                routing.experts.new_ones(len(routing.experts), dtype=torch.bool)
                if mask is None
                else mask
                for routing, mask in zip(self.routings, self._masks(), strict=True)
            ]
        )

    @property
    def kept(self) -> Tensor:
        """(T, K) bool: the choice was carried out."""
        return self.experts < self.num_experts

    @property
    def logits(self) -> Tensor:
        """(T, E). ValueError where the router of a Hugging Face family does not give them."""
        if any(logits is None for logits in self.all_logits):
            raise ValueError("logits are not known: this model's router does not return them")
        return self._real([logits for logits in self.all_logits if logits is not None])

    @property
    def inputs(self) -> Tensor:
        """(T, D). ValueError if they were not kept."""
        if not self.all_inputs:
            raise ValueError("inputs were not recorded: use trace_routing(model, keep_inputs=True)")
        return self._real(self.all_inputs)

    @property
    def margins(self) -> Tensor:
        """(T,) K-th largest logit minus the next: how much a logit must move for the choice to
        change; ∞ if K = E."""
        top_k = self.all_intended[0].experts.shape[1]
        if top_k >= self.num_experts:
            return self.logits.new_full((len(self.logits),), float("inf"))
        best = self.logits.topk(top_k + 1, dim=-1).values
        return best[:, top_k - 1] - best[:, top_k]

    def load(self) -> Tensor:
        """(E,) share of the kept choices each expert got; sums to 1."""
        counts = torch.bincount(self.experts.flatten().long(), minlength=self.num_experts + 1)[
            : self.num_experts
        ]
        return counts / counts.sum().clamp_min(1)

    def _masks(self) -> Sequence[Tensor | None]:
        return self.all_masks or [None] * len(self.routings)

    def _real(self, forwards: Sequence[Tensor]) -> Tensor:
        """The rows of the real tokens of all forwards."""
        both = zip(forwards, self._masks(), strict=True)
        return torch.cat([rows if mask is None else rows[mask] for rows, mask in both])


@dataclass
class RoutingTrace:
    """``layers`` maps a layer's name in the model to its LayerTrace, in the model's order."""

    layers: dict[str, LayerTrace] = field(default_factory=dict)


@contextmanager
def trace_routing(
    model: nn.Module, *, keep_graph: bool = False, keep_inputs: bool = False
) -> Iterator[RoutingTrace]:
    """Record what every MoE layer decides while the block runs: layers of this library, upcycled
    ones, and the experts of Hugging Face models under any implementation. Outside the block it
    costs nothing, because it is a hook. Padding that a mask names is left out, and what activation
    checkpointing runs again in the backward pass is not recorded again.

    Compiled models run eagerly inside the block (compiled code knows no hooks) and compiled again
    after it.

    Args:
        model: any module; one without MoE layers gives an empty trace.
        keep_graph: record gates and logits with their graph, so that a loss can be made of them; by
            default they are detached.
        keep_inputs: record the tokens that each layer got, too.
    """
    layers = routing_sites(model)
    trace = RoutingTrace({name: LayerTrace(layer.num_experts) for name, layer in layers.items()})

    def keep(tensor: Tensor) -> Tensor:
        return tensor if keep_graph else tensor.detach()

    def recorder(layer: LayerTrace) -> Watch:
        def record(decision: Decision, realised: Routing) -> None:
            layer.routings.append(Routing(*map(keep, realised)))
            layer.all_intended.append(Routing(*map(keep, decision.routing)))
            layer.all_logits.append(None if decision.logits is None else keep(decision.logits))
            layer.all_masks.append(decision.mask)
            if keep_inputs:
                layer.all_inputs.append(keep(decision.x))

        return record

    recorders = {name: recorder(layer) for name, layer in trace.layers.items()}
    with attached(layers, {}, recorders, model=model):
        yield trace
