"""nn.Modules: routers, experts, MoE layers, vision transformers; adapters for models made
elsewhere; where tokens go, and where else they could."""

from ironmoe.kernels import ExpertGroups, Routing
from ironmoe.moe.adapters.upcycle import upcycle, upcycle_by_recipe
from ironmoe.moe.adapters.upcycled_files import load_upcycled, recipe_of, save_upcycled
from ironmoe.moe.checkpoints.errors import CheckpointError
from ironmoe.moe.checkpoints.read import open_vmoe_checkpoint, read_vmoe_checkpoint
from ironmoe.moe.checkpoints.read_npz import open_npz_checkpoint, read_npz_checkpoint
from ironmoe.moe.checkpoints.write import write_vmoe_checkpoint
from ironmoe.moe.freeze import freeze_weights
from ironmoe.moe.layers.expert_linear import ExpertLinear
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.layers.soft import SoftMoE
from ironmoe.moe.offload.offload import offload_experts
from ironmoe.moe.offload.stacks import ExpertOffload
from ironmoe.moe.routers.balance import (
    choice_counts,
    deepseek_balance_loss,
    global_batch_balance_loss,
    mixtral_balance_loss,
)
from ironmoe.moe.routers.capacity import Capacity
from ironmoe.moe.routers.ensemble import EnsembleRouter
from ironmoe.moe.routers.expert_choice import ExpertChoiceRouter
from ironmoe.moe.routers.global_load import start_global_batch
from ironmoe.moe.routers.losses import (
    aux_loss_in_eval,
    balance_loss,
    collect_aux_loss,
    importance_loss,
    load_loss,
    router_z_loss,
)
from ironmoe.moe.routers.router_losses import BALANCE_LOSSES
from ironmoe.moe.routers.selection_bias import update_selection_bias
from ironmoe.moe.routers.top_k import RouterOutput, TopKRouter
from ironmoe.moe.routing.health import RouterHealth
from ironmoe.moe.routing.intervene import intervene
from ironmoe.moe.routing.metrics import routing_change, routing_iou
from ironmoe.moe.routing.routed_layers import Decision, routing_sites
from ironmoe.moe.routing.trace import LayerTrace, RoutingTrace, trace_routing
from ironmoe.moe.vit.images import pad_images
from ironmoe.moe.vit.vit import VMoE

__all__ = [
    "BALANCE_LOSSES",
    "Capacity",
    "CheckpointError",
    "Decision",
    "EnsembleRouter",
    "ExpertChoiceRouter",
    "ExpertGroups",
    "ExpertLinear",
    "ExpertOffload",
    "LayerTrace",
    "MoE",
    "RouterHealth",
    "RouterOutput",
    "Routing",
    "RoutingTrace",
    "SoftMoE",
    "TopKRouter",
    "VMoE",
    "aux_loss_in_eval",
    "balance_loss",
    "choice_counts",
    "collect_aux_loss",
    "deepseek_balance_loss",
    "freeze_weights",
    "global_batch_balance_loss",
    "importance_loss",
    "intervene",
    "load_loss",
    "load_upcycled",
    "mixtral_balance_loss",
    "offload_experts",
    "open_npz_checkpoint",
    "open_vmoe_checkpoint",
    "pad_images",
    "read_npz_checkpoint",
    "read_vmoe_checkpoint",
    "recipe_of",
    "router_z_loss",
    "routing_change",
    "routing_iou",
    "routing_sites",
    "save_upcycled",
    "start_global_batch",
    "trace_routing",
    "upcycle",
    "upcycle_by_recipe",
    "update_selection_bias",
    "write_vmoe_checkpoint",
]
