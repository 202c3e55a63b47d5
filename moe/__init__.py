"""nn.Modules: routers, experts, MoE layers, vision transformers; adapters for models made elsewhere; where tokens go, and where else
they could."""

from ironmoe.kernels import ExpertGroups, Routing
from ironmoe.moe.capacity import Capacity
from ironmoe.moe.ensemble import EnsembleRouter
from ironmoe.moe.expert_choice import ExpertChoiceRouter
from ironmoe.moe.freeze import freeze_weights
from ironmoe.moe.intervene import intervene
from ironmoe.moe.jax_checkpoint import CheckpointError, read_npz_checkpoint, read_vmoe_checkpoint
from ironmoe.moe.jax_checkpoint_write import write_vmoe_checkpoint
from ironmoe.moe.losses import aux_loss_in_eval, balance_loss, collect_aux_loss, importance_loss, load_loss, router_z_loss
from ironmoe.moe.metrics import routing_change, routing_iou
from ironmoe.moe.moe import ExpertLinear, MoE
from ironmoe.moe.router import RouterOutput, TopKRouter
from ironmoe.moe.sites import Decision, routing_sites
from ironmoe.moe.soft import SoftMoE
from ironmoe.moe.trace import LayerTrace, RoutingTrace, trace_routing
from ironmoe.moe.upcycle import upcycle
from ironmoe.moe.vit import VMoE

__all__ = [
    "Capacity",
    "CheckpointError",
    "Decision",
    "EnsembleRouter",
    "ExpertChoiceRouter",
    "ExpertGroups",
    "ExpertLinear",
    "LayerTrace",
    "MoE",
    "RouterOutput",
    "Routing",
    "RoutingTrace",
    "SoftMoE",
    "TopKRouter",
    "VMoE",
    "aux_loss_in_eval",
    "balance_loss",
    "collect_aux_loss",
    "freeze_weights",
    "importance_loss",
    "intervene",
    "load_loss",
    "read_npz_checkpoint",
    "read_vmoe_checkpoint",
    "router_z_loss",
    "routing_change",
    "routing_iou",
    "routing_sites",
    "trace_routing",
    "upcycle",
    "write_vmoe_checkpoint",
]
