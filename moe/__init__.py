"""nn.Modules: routers, experts, MoE layers, vision transformers, and a view of where tokens go."""

from ironmoe.kernels import Routing
from ironmoe.moe.freeze import freeze_weights
from ironmoe.moe.losses import balance_loss, collect_aux_loss, importance_loss, load_loss, router_z_loss
from ironmoe.moe.moe import ExpertLinear, MoE
from ironmoe.moe.router import RouterOutput, TopKRouter
from ironmoe.moe.trace import LayerTrace, RoutingTrace, routing_iou, trace_routing
from ironmoe.moe.vit import VMoE

__all__ = [
    "ExpertLinear",
    "LayerTrace",
    "MoE",
    "RouterOutput",
    "Routing",
    "RoutingTrace",
    "TopKRouter",
    "VMoE",
    "balance_loss",
    "collect_aux_loss",
    "freeze_weights",
    "importance_loss",
    "load_loss",
    "router_z_loss",
    "routing_iou",
    "trace_routing",
]
