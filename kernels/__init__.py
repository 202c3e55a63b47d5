"""Tensors in, tensors out: routing, dispatch, grouped products, the fused expert and its gradients,
attack steps.

Read in this order:

    types           what operators hand to each other: Routing, Dispatch
    route           which way a call goes: the CPU loop, an operator, Triton or the torch twin
    onnx_graph      what the operators become in an ONNX graph
    scores, topk    logits → Routing
    dispatch        experts → Dispatch: rows sorted by expert
    activations     value and derivative of a hidden unit
    tiles           the CPU loop over rows of one expert
    grouped_matmul, expert_down, combine    the products and the sum over choices, with gradients
    expert_mlp      the two-layer expert, made of these
    autograd/       which gradients are wanted, H computed again, torch.func
    tuning          block sizes by product, chip and dtype
    gpu/            the Triton kernels: launch, tiles, product, then one file an operator
    compile/        every kernel compiled for GPUs that are not here
    attack_step, flops                      stand alone

An operator's file holds its torch twin and its registration; its kernel lies in ``gpu/`` under the
same name. Shape suffixes: T tokens, D width, F hidden width, E experts, K choices of a token, R =
T · K rows, small r the rows of one tile.
"""

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
