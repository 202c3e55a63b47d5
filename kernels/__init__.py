"""Tensors in, tensors out: routing, dispatch, grouped products, the fused expert and its gradients,
attack steps."""

from ironmoe.kernels import flops as flops  # tells torch's FLOP counter of the operators
from ironmoe.kernels.activations import ACTIVATIONS, Activation
from ironmoe.kernels.attack_step import l2_step, linf_step
from ironmoe.kernels.combine import combine
from ironmoe.kernels.dispatch import plan_dispatch
from ironmoe.kernels.expert_mlp import expert_mlp
from ironmoe.kernels.grouped_matmul import grouped_matmul
from ironmoe.kernels.topk import topk_route
from ironmoe.kernels.types import Dispatch, ExpertGroups, Routing

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Dispatch",
    "ExpertGroups",
    "Routing",
    "combine",
    "expert_mlp",
    "grouped_matmul",
    "l2_step",
    "linf_step",
    "plan_dispatch",
    "topk_route",
]
