"""Who is measured beside us, and the check that all of them compute the same thing before anything
is timed."""

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

SAMPLE = 256  # tokens whose results are compared
# error of the worst row, relative to the row
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# transformers' batched_mm copies the weights of every row; more than this is not tried
BATCHED_BYTES = 8 << 30


class Peer(NamedTuple):
    """An implementation of the layer.

    build: from a problem to the layer; objection: why it cannot do this problem, or None; module:
        what must be installed;
    fused: whether gather, activation or combine are part of its products, which makes it one of
        those to beat;
    captures: whether a CUDA graph can hold it.
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
    """An MLP of one expert, without routing, on all rows (a ``dense_problem``)."""
    activation = get_activation(problem.shape.activation)
    w_in, w_out = problem.w_in[0], problem.w_out[0]
    b_in, b_out = (None if bias is None else bias[0] for bias in (problem.b_in, problem.b_out))
    return lambda: F.linear(activation.value(F.linear(problem.x, w_in, b_in)), w_out, b_out)


def _sorted_pipeline(
    problem: Problem, grouped: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[], Tensor]:
    """Sort, gather, product, bias, activation, product, bias, put back, weigh and sum: one
    operation each.

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
    """Mixtral's experts with our weights in them."""

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


class Reference(NamedTuple):
    """The layer by its definition on some tokens, in float64: y, and all gradients when ``dy`` is 0
    for every other token.

    ``expected`` has one matrix of the tokens for y, x and gates, and one tensor an expert for a
    parameter.
    """

    tokens: Tensor
    dy: Tensor
    expected: dict[str, list[Tensor]]


def reference(problem: Problem, sample: int = SAMPLE) -> Reference:
    """Expert by expert in plain torch operations, of which none is ours but the activation."""
    p = problem
    tokens = torch.randperm(p.shape.tokens, device=p.x.device)[:sample].sort().values
    dy = torch.zeros_like(p.dy).index_copy(0, tokens, p.dy[tokens])
    own = {
        name: [part.double().requires_grad_() for part in leaf.detach()]
        for name, leaf in p.parameters.items()
    }
    x, gates = (leaf.detach()[tokens].double().requires_grad_() for leaf in (p.x, p.gates))
    activation, experts = get_activation(p.shape.activation), p.experts[tokens]
    y = torch.zeros_like(x)
    for expert in range(p.shape.num_experts):
        weights = {name: parts[expert] for name, parts in own.items()}
        token, slot = (experts == expert).nonzero(as_tuple=True)
        hidden = F.linear(x[token], weights["w_in"], weights.get("b_in"))
        rows = F.linear(activation.value(hidden), weights["w_out"], weights.get("b_out"))
        y = y.index_add(0, token, gates[token, slot].unsqueeze(1) * rows)
    leaves = {"x": [x], "gates": [gates], **own}
    gradients = iter(
        torch.autograd.grad(
            y, [part for parts in leaves.values() for part in parts], dy[tokens].double()
        )
    )
    return Reference(
        tokens,
        dy,
        {
            "y": [y.detach()],
            **{name: [next(gradients) for _ in parts] for name, parts in leaves.items()},
        },
    )


def errors(build: Build, problem: Problem, correct: Reference) -> dict[str, float]:
    """The largest error of y and of every gradient, by name: see ``worst_row_error``. NaN where a
    gradient is missing.

    Asked for three times, as it will be timed: without autograd, with frozen weights, and with all
        gradients.
    """
    with torch.no_grad():
        found = {"y in inference": build(problem)()}
    for suffix, asked in ((" with frozen weights", problem.frozen()), ("", problem)):
        y = build(asked)()
        wanted = {name: leaf for name, leaf in asked.leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad(y, list(wanted.values()), correct.dy, allow_unused=True)
        named = {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}
        found |= {name + suffix: result for name, result in named.items()}
    return {name: _error(name.split(" ")[0], result, correct) for name, result in found.items()}


def _error(name: str, found: Tensor | None, correct: Reference) -> float:
    if found is None:
        return float("nan")
    of_tokens = name in ("y", "x", "gates")
    return worst_row_error(
        [found[correct.tokens]] if of_tokens else list(found), correct.expected[name]
    )


def worst_row_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """max over rows of ‖found − expected‖ / ‖expected‖, where a row shorter than the average one
    counts as average.

    Tensor by tensor, so that no wide copy of all experts is needed. One wrong row shows, however
    many are right; NaN or infinity in ``found`` gives NaN or infinity, another shape NaN.
    """
    if [a.shape for a in found] != [b.shape for b in expected]:
        return float("nan")
    square_norm = torch.stack([b.square().sum() for b in expected]).sum()
    average = (square_norm / sum(b.numel() // b.shape[-1] for b in expected)).sqrt()
    worst = [
        (
            (a.double() - b).norm(dim=-1) / torch.maximum(b.norm(dim=-1), average).clamp_min(1e-300)
        ).max()
        for a, b in zip(found, expected, strict=True)
    ]
    return torch.stack(worst).max().item()


def disagreement(found: dict[str, float], dtype: torch.dtype) -> str | None:
    """Which result is too far from the reference, in words; None if all are near enough."""
    wrong = [
        f"{name} by {error:.2g}" for name, error in found.items() if not error <= TOLERANCE[dtype]
    ]
    return (
        f"disagrees with the reference in {', '.join(wrong)} (allowed {TOLERANCE[dtype]:g})"
        if wrong
        else None
    )
