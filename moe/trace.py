"""See where tokens go: record the routing of every MoE layer during forward passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ironmoe.kernels import Routing
from ironmoe.moe.moe import MoE
from ironmoe.moe.router import RouterOutput


@dataclass
class LayerTrace:
    """The routing of one layer, tokens of all traced forwards one after another.

    gates (T, K); experts (T, K) with E marking a dropped choice; logits (T, E). All detached.
    """

    num_experts: int
    routings: list[Routing] = field(default_factory=list)
    all_logits: list[Tensor] = field(default_factory=list)

    @property
    def gates(self) -> Tensor:
        return torch.cat([r.gates for r in self.routings])

    @property
    def experts(self) -> Tensor:
        return torch.cat([r.experts for r in self.routings])

    @property
    def logits(self) -> Tensor:
        return torch.cat(self.all_logits)

    def load(self) -> Tensor:
        """(E,) share of the kept choices each expert got; sums to 1."""
        counts = torch.bincount(self.experts.flatten().long(), minlength=self.num_experts + 1)[: self.num_experts]
        return counts / counts.sum().clamp_min(1)


@dataclass
class RoutingTrace:
    """``layers`` maps a layer's name in the model to its LayerTrace, in the model's order."""

    layers: dict[str, LayerTrace] = field(default_factory=dict)


@contextmanager
def trace_routing(model: nn.Module) -> Iterator[RoutingTrace]:
    """Record gates, experts and logits of every MoE layer while the block runs. Off, it costs nothing: it is a hook."""
    trace = RoutingTrace()
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            layer = trace.layers[name] = LayerTrace(module.num_experts)

            def record(_module: nn.Module, _args: object, output: RouterOutput, layer: LayerTrace = layer) -> None:
                layer.routings.append(Routing(output.routing.gates.detach(), output.routing.experts.detach()))
                layer.all_logits.append(output.logits.detach())

            hooks.append(module.router.register_forward_hook(record))
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def routing_iou(experts_a_TK: Tensor, experts_b_TK: Tensor, num_experts: int) -> Tensor:
    """(T,) |A ∩ B| / |A ∪ B| of the sets of experts each token uses in two passes; dropped choices are in no set.

    0 where both sets are empty, as in the official V-MoE attack code: there a token dropped twice counts as changed.
    The paper reports 1 − IoU, averaged over tokens, as the routing change.
    """
    used_a, used_b = (
        torch.zeros(len(e), num_experts + 1, dtype=torch.bool, device=e.device).scatter_(1, e.long(), True)[:, :num_experts]
        for e in (experts_a_TK, experts_b_TK)
    )
    return (used_a & used_b).sum(1) / (used_a | used_b).sum(1).clamp_min(1)
