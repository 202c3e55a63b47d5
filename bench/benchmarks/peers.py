"""The implementations that are measured beside ours. ``reference.py`` checks that all of them
compute the same thing."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ironmoe.bench.benchmarks.passes import Build
from ironmoe.bench.benchmarks.shapes import Problem
from ironmoe.kernels import expert_mlp
from ironmoe.kernels.activations import get_activation

# transformers' batched_mm copies the weights of every row; more than this is not tried
BATCHED_BYTES = 8 << 30


class Peer(NamedTuple):
    """An implementation of the layer.

    build: from a problem to the layer; module: the package that must be installed; objection: why
    it cannot do a problem, or None.

    fused: whether gather, activation or combine are part of its products, which makes it a peer to
    beat; captures: whether a CUDA graph can hold it.
    """

    build: Build
    module: str
    objection: Callable[[Problem], str | None] = lambda problem: None
    fused: bool = False
    captures: bool = False

    def why_not(self, problem: Problem) -> str | None:
        """Why this peer is not measured on the problem; None if it is."""
        if find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return self.objection(problem)


def ironmoe(problem: Problem) -> Callable[[], Tensor]:
    p = problem

    def layer() -> Tensor:
        return expert_mlp(
            p.x,
            p.w_in,
            p.w_out,
            p.routing,
            b_in=p.b_in,
            b_out=p.b_out,
            activation=p.shape.activation,
        )

    return layer


def dense(problem: Problem) -> Callable[[], Tensor]:
    """An MLP of one expert without routing, for all rows of a ``dense_problem``."""
    activation = get_activation(problem.shape.activation)
    w_in, w_out = problem.w_in[0], problem.w_out[0]
    b_in, b_out = (None if bias is None else bias[0] for bias in (problem.b_in, problem.b_out))
    return lambda: F.linear(activation.value(F.linear(problem.x, w_in, b_in)), w_out, b_out)


def _sorted_pipeline(
    problem: Problem, grouped: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[], Tensor]:
    """The layer with one operation for each step: sort, gather, product, bias, activation, product,
    bias, put back, weigh and sum.

    ``grouped`` takes sorted rows (R, K), matrices (E, K, N) and the end of each expert's rows (E,).
    """
    p, activation = problem, get_activation(problem.shape.activation)
    experts = torch.arange(p.shape.num_experts, device=p.x.device, dtype=p.experts.dtype)

    def layer() -> Tensor:
        sorted_experts, order = p.experts.flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_experts, experts, right=True, out_int32=True)
        hidden = grouped(p.x.index_select(0, order // p.shape.top_k), p.w_in.transpose(1, 2), ends)
        if p.b_in is not None:
            hidden = hidden + p.b_in.index_select(0, sorted_experts)
        rows = grouped(activation.value(hidden), p.w_out.transpose(1, 2), ends)
        if p.b_out is not None:
            rows = rows + p.b_out.index_select(0, sorted_experts)
        back = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        rows_TKD = rows.index_select(0, back).view(*p.experts.shape, -1)
        return torch.bmm(p.gates.to(rows.dtype).unsqueeze(1), rows_TKD).squeeze(1)

    return layer


def torch_grouped_mm(problem: Problem) -> Callable[[], Tensor]:
    return _sorted_pipeline(
        problem, lambda rows, weights, ends: F.grouped_mm(rows, weights, offs=ends)
    )


def grouped_mm_bf16(problem: Problem) -> Callable[[], Tensor]:
    from grouped_mm_bf16 import grouped_mm

    return _sorted_pipeline(
        problem, lambda rows, weights, ends: grouped_mm(rows, weights, offs=ends)
    )


def moe_ops(problem: Problem) -> Callable[[], Tensor]:
    from moe_ops import grouped_gemm, permute, unpermute

    p, activation = problem, get_activation(problem.shape.activation)

    def layer() -> Tensor:
        rows, row_map, offsets = permute(p.x, p.experts, E=p.shape.num_experts)
        out = grouped_gemm(activation.value(grouped_gemm(rows, p.w_in, offsets)), p.w_out, offsets)
        return unpermute(out, row_map, p.gates, p.shape.tokens, p.shape.top_k)

    return layer


def liger(problem: Problem) -> Callable[[], Tensor]:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    p = problem
    return lambda: LigerFusedMoEFunction.apply(p.x, p.w_in, p.w_out, p.experts, p.gates)


def _transformers(implementation: str) -> Build:
    """Mixtral's experts of transformers, with the weights of the problem in them."""

    def build(problem: Problem) -> Callable[[], Tensor]:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        shape = problem.shape
        config = MixtralConfig(
            hidden_size=shape.dim,
            intermediate_size=shape.hidden,
            num_local_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = implementation

        with torch.device("meta"):
            module: Any = MixtralExperts(config)

        del module.gate_up_proj, module.down_proj
        module.gate_up_proj, module.down_proj = problem.w_in, problem.w_out
        experts = problem.experts.long()
        return lambda: module(problem.x, experts, problem.gates)

    return build


def _needs_gpu(problem: Problem) -> str | None:
    return None if problem.x.is_cuda else "needs a GPU"


def _swiglu_only(problem: Problem) -> str | None:
    return (
        None
        if problem.shape.activation == "swiglu" and not problem.shape.bias
        else "has SwiGLU without biases only"
    )


def _batched(problem: Problem) -> str | None:
    copied = problem.shape.rows * (problem.w_in[0].nbytes + problem.w_out[0].nbytes)
    too_large = copied > BATCHED_BYTES
    return _swiglu_only(problem) or (
        f"would copy {copied / 1e9:.0f} GB of weights" if too_large else None
    )


def _moe_ops(problem: Problem) -> str | None:
    experts = problem.shape.num_experts
    if problem.shape.bias:
        return "has no biases"
    return _needs_gpu(problem) or (
        None if experts & (experts - 1) == 0 else "needs a power of two of experts"
    )


OURS, DENSE = "ironmoe", "dense MLP"
IRONMOE = Peer(ironmoe, "torch", captures=True)
PEERS: dict[str, Peer] = {
    "torch grouped_mm": Peer(torch_grouped_mm, "torch", captures=True),
    "transformers grouped_mm": Peer(_transformers("grouped_mm"), "transformers", _swiglu_only),
    "transformers batched_mm": Peer(_transformers("batched_mm"), "transformers", _batched),
    "transformers eager": Peer(_transformers("eager"), "transformers", _swiglu_only),
    "moe-ops": Peer(moe_ops, "moe_ops", _moe_ops),
    "grouped-mm-bf16": Peer(grouped_mm_bf16, "grouped_mm_bf16", _needs_gpu),
    "liger-kernel": Peer(
        liger, "liger_kernel", lambda p: _swiglu_only(p) or _needs_gpu(p), fused=True
    ),
}
