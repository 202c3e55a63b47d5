"""The policy that repeats the routing of another forward."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ironmoe.kernels import Routing
from ironmoe.kernels.route import transformed
from ironmoe.moe.routing.gates import GATES, gates_for
from ironmoe.moe.routing.ranks import all_available, by_rank
from ironmoe.moe.routing.routed_layers import Decision
from ironmoe.moe.routing.trace import LayerTrace, RoutingTrace


@dataclass(frozen=True)
class Replay:
    """The routing that was carried out in another forward with the same number of tokens. It puts
    the routing of clean images on adversarial ones, or the other way round. Padding counts in
    neither forward: the n-th real token gets what the n-th real token had. A trace with padding
    fits tokens with the same mask, and the real tokens alone.

    trace: of the whole model, or of the one layer to steer.
    gates: "recorded" (constants), or one of ``GATES`` for new gates of the recorded experts.
    """

    trace: RoutingTrace | LayerTrace
    gates: str = "recorded"

    def __post_init__(self) -> None:
        if self.gates not in ("recorded", *GATES):
            raise ValueError(f"gates must be one of {('recorded', *GATES)}, got {self.gates!r}")

    def __call__(self, decision: Decision) -> Routing:
        layer = self._layer(decision)
        recorded_tokens = len(layer.experts) if layer.routings else 0
        tokens = _real_tokens(decision)
        if (recorded_tokens, layer.num_experts) != (tokens, decision.num_experts):
            raise ValueError(
                f"trace must have recorded {tokens} tokens in {decision.layer} and "
                f"{decision.num_experts} experts, got {recorded_tokens} and {layer.num_experts}"
            )

        _check_masks(layer, decision)
        recorded = Routing(
            layer.gates.detach().to(decision.routing.gates), layer.experts.to(decision.x.device)
        )
        if decision.mask is not None:
            recorded = _among_padding(recorded, decision.mask, decision.num_experts)
        all_available(recorded.experts, decision)
        if self.gates == "recorded":
            return recorded

        ranked = decision._replace(routing=by_rank(decision.routing, decision.num_experts))
        experts_TK = by_rank(recorded, decision.num_experts).experts
        return Routing(gates_for(ranked, experts_TK, self.gates, decision.logits), experts_TK)

    def _layer(self, decision: Decision) -> LayerTrace:
        if isinstance(self.trace, LayerTrace):
            return self.trace
        if decision.layer not in self.trace.layers:
            raise ValueError(
                f"trace must have a layer {decision.layer!r}, got {list(self.trace.layers)}"
            )
        return self.trace.layers[decision.layer]


def _real_tokens(decision: Decision) -> int:
    return len(decision.x) if decision.mask is None else int(decision.mask.sum())


def _check_masks(layer: LayerTrace, decision: Decision) -> None:
    """ValueError where tokens with padding get the trace of tokens with other padding: the n-th
    real token of one may then be another than that of the other."""
    mask_T = decision.mask
    if mask_T is None or transformed():  # under vmap no value can be read
        return
    recorded_T = layer.mask.to(mask_T.device)
    if recorded_T.all() or mask_T.all() or torch.equal(recorded_T, mask_T):
        return
    raise ValueError(
        f"trace must have been recorded in {decision.layer!r} with the mask of these tokens, or "
        "without padding, got one with another mask"
    )


def _among_padding(routing: Routing, mask_T: Tensor, num_experts: int) -> Routing:
    """The routing of real tokens → that of all tokens, in which padding has no expert."""
    gates_TK = routing.gates.new_zeros(len(mask_T), routing.gates.shape[1])
    experts_TK = torch.full_like(gates_TK, num_experts, dtype=routing.experts.dtype)
    gates_TK[mask_T] = routing.gates
    experts_TK[mask_T] = routing.experts
    return Routing(gates_TK, experts_TK)
