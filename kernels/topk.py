"""Top-k routing: logits to gates and expert choices.

Shape suffixes: T tokens, E experts, K choices. ``scores`` says what a logit is worth; this file
knows no score by name.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ironmoe.kernels.onnx_graph import stable_sort
from ironmoe.kernels.route import forward_mode, may_look, takes_operators, takes_triton, transformed
from ironmoe.kernels.scores import get_score
from ironmoe.kernels.types import ExpertGroups, GateRule, Routing

MAX_EXPERTS, MAX_TOP_K = 1024, 32  # of the Triton kernel; beyond them the torch twin runs
ORDERS = ("score_first", "topk_first")
GROUP_SCORES = ("max", "top2_sum")


class NaNLogits(ValueError):
    """A router's logits are NaN, so that no expert is better than another."""


def topk_route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    order: str = "score_first",
    renormalize: bool = False,
    selection_bias: Tensor | None = None,
    groups: ExpertGroups | None = None,
    scale: float = 1.0,
) -> Routing:
    """Choose ``top_k`` experts for each token. Ties go to the lower expert index, always.

    Args:
        logits: (T, E), any float dtype; scores are computed in at least float32.
        top_k: K, 1 ≤ K ≤ E (≤ the number of experts in the kept groups).
        score: a name in ``ironmoe.kernels.scores.SCORES``, such as "softmax" or "sigmoid".
        order: "score_first" scores all E experts and picks the best (V-MoE, Qwen, DeepSeek);
            "topk_first" picks by logit and scores only the K chosen (Mixtral, gpt-oss).
        renormalize: divide the K gates of a token by their sum.
        selection_bias: (E,), added to what is compared and never to what weighs (DeepSeek-V3's
            balance bias).
        groups: keep only the best groups of experts before choosing.
        scale: factor on the final gates.

    Returns:
        Routing with gates (T, K), differentiable with respect to ``logits``, and experts (T, K)
        int32.

    Raises:
        ValueError: an argument outside the values above, or NaN among the logits. On a GPU, where
            looking for NaN would wait for the device, that is checked under
            ``torch.autograd.set_detect_anomaly(True)`` only; indices are in range in any case.
    """
    rule = GateRule(score, order, renormalize, scale)
    _check(logits, top_k, rule, selection_bias, groups)
    if takes_operators(logits) and not transformed() and not forward_mode():
        limits = groups or ExpertGroups(1, 1)
        gates, experts = topk_route_op(
            logits,
            top_k,
            score=score,
            order=order,
            renormalize=renormalize,
            selection_bias=selection_bias,
            num_groups=limits.num_groups,
            keep_groups=limits.keep,
            group_score=limits.score,
            scale=scale,
        )
        return Routing(gates, experts)
    return _route(logits, top_k, rule, selection_bias, groups)


def _route(
    logits: Tensor, top_k: int, rule: GateRule, bias: Tensor | None, groups: ExpertGroups | None
) -> Routing:
    """The torch twin."""
    keys = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    if rule.order == "score_first":
        keys = get_score(rule.score).value(keys)
    experts = _select(keys, top_k, bias, groups)
    return Routing(gates_of_choice(logits, experts, rule), experts.to(torch.int32))


def gates_of_choice(logits: Tensor, experts: Tensor, rule: GateRule) -> Tensor:
    """(T, K) gates of a choice (T, K) int64 already made, in torch operations."""
    score = get_score(rule.score).value
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if rule.order == "score_first":
        gates = score(z).gather(-1, experts)
    else:
        gates = score(z.gather(-1, experts))

    if rule.renormalize:
        gates = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
    return gates * rule.scale if rule.scale != 1.0 else gates


def _select(keys: Tensor, top_k: int, bias: Tensor | None, groups: ExpertGroups | None) -> Tensor:
    """(T, K) int64 indices of the largest keys. A stable sort, because torch.topk does not promise
    an order for ties."""
    if bias is not None:
        keys = keys + bias.detach()
    if groups is not None:
        keys = keys.masked_fill(~_in_kept_groups(keys, groups), float("-inf"))
    return stable_sort(keys, -1, descending=True)[1][:, :top_k]


def _in_kept_groups(keys: Tensor, groups: ExpertGroups) -> Tensor:
    """(T, E) bool: whether the expert's group is among the best ``groups.keep`` of its token."""
    by_group = keys.unflatten(-1, (groups.num_groups, -1))
    members = 1 if groups.score == "max" else min(2, by_group.shape[-1])
    group_keys = by_group.topk(members, dim=-1).values.sum(-1)
    kept = stable_sort(group_keys, -1, descending=True)[1][:, : groups.keep]
    mask = torch.zeros_like(group_keys, dtype=torch.bool).scatter_(-1, kept, True)
    return mask.unsqueeze(-1).expand_as(by_group).flatten(-2)


def _check(
    logits: Tensor,
    top_k: int,
    rule: GateRule,
    bias: Tensor | None,
    groups: ExpertGroups | None,
) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a float tensor (T, E), got {logits.dtype} of shape "
            f"{tuple(logits.shape)}"
        )
    num_experts = logits.shape[1]
    get_score(rule.score)  # ValueError where it is unknown
    if rule.order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {rule.order!r}")
    if bias is not None and bias.shape != (num_experts,):
        raise ValueError(
            f"selection_bias must have shape ({num_experts},), one value an expert, got "
            f"{tuple(bias.shape)}"
        )

    candidates = num_experts
    if groups is not None:
        if groups.score not in GROUP_SCORES:
            raise ValueError(f"groups.score must be one of {GROUP_SCORES}, got {groups.score!r}")
        if (
            groups.num_groups < 1
            or num_experts % groups.num_groups
            or not 1 <= groups.keep <= groups.num_groups
        ):
            raise ValueError(
                f"groups must split the {num_experts} experts evenly and keep 1 to num_groups of "
                f"them, got {groups}"
            )
        candidates = num_experts // groups.num_groups * groups.keep
    if not 1 <= top_k <= candidates:
        raise ValueError(
            f"top_k must be from 1 to {candidates}, the number of experts to choose from, got "
            f"{top_k}"
        )

    debugging = (
        not torch.compiler.is_compiling()
        and torch.is_anomaly_enabled()
        and logits.device.type == "cuda"
    )
    if (may_look(logits) or debugging) and bool(logits.isnan().any()):
        token = int(logits.isnan().any(-1).nonzero()[0])
        raise NaNLogits(
            f"logits must not be NaN, got NaN first at token {token}: the input or the router's "
            "weights are not finite"
        )


@custom_op("ironmoe::topk_route", mutates_args=())
def topk_route_op(
    logits: Tensor,
    top_k: int,
    score: str,
    order: str,
    renormalize: bool,
    selection_bias: Tensor | None,
    num_groups: int,
    keep_groups: int,
    group_score: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(gates, experts); one group means no groups."""
    groups = ExpertGroups(num_groups, keep_groups, group_score) if num_groups > 1 else None
    rule = GateRule(score, order, renormalize, scale)
    if takes_triton(logits) and logits.shape[1] <= MAX_EXPERTS and top_k <= MAX_TOP_K:
        from ironmoe.kernels.gpu import topk as gpu

        return gpu.route(logits, top_k, rule, selection_bias, groups)
    gates, experts = _route(logits, top_k, rule, selection_bias, groups)
    return gates, experts


@topk_route_op.register_fake
def _(  # type: ignore[no-untyped-def]
    logits,
    top_k,
    score,
    order,
    renormalize,
    selection_bias,
    num_groups,
    keep_groups,
    group_score,
    scale,
):
    get_score(score)  # an unknown one is an error while tracing, too
    gates = logits.new_empty(
        logits.shape[0], top_k, dtype=torch.promote_types(logits.dtype, torch.float32)
    )
    return gates, torch.empty_like(gates, dtype=torch.int32)


@custom_op("ironmoe::topk_route_backward", mutates_args=())
def topk_route_backward_op(
    d_gates: Tensor,
    logits: Tensor,
    experts: Tensor,
    score: str,
    order: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    """d_logits; the scores are computed again."""
    rule = GateRule(score, order, renormalize, scale)
    if takes_triton(logits) and logits.shape[1] <= MAX_EXPERTS and experts.shape[1] <= MAX_TOP_K:
        from ironmoe.kernels.gpu import topk as gpu

        return gpu.route_backward(d_gates, logits, experts, rule)
    return _backward_by_torch(d_gates, logits.detach().requires_grad_(), experts, rule)


@topk_route_backward_op.register_fake
def _(d_gates, logits, experts, score, order, renormalize, scale):  # type: ignore[no-untyped-def]
    get_score(score)
    return logits.new_empty(logits.shape)


def _backward_by_torch(d_gates: Tensor, logits: Tensor, experts: Tensor, rule: GateRule) -> Tensor:
    """The torch twin, differentiable in turn."""
    experts = experts.long()
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    d_gates = d_gates * rule.scale

    if rule.renormalize:
        raw = gates_of_choice(logits, experts, rule._replace(renormalize=False, scale=1.0))
        total = raw.sum(-1, keepdim=True)
        tiny = torch.finfo(total.dtype).tiny
        shared = (d_gates * raw).sum(-1, keepdim=True) / total.clamp_min(tiny)
        d_gates = (d_gates - shared.masked_fill(total < tiny, 0)) / total.clamp_min(tiny)

    score, zeros = get_score(rule.score), torch.zeros_like(z)
    if rule.order == "topk_first":
        d_z = zeros.scatter(-1, experts, score.backward(d_gates, z.gather(-1, experts)))
    else:
        d_z = score.backward(zeros.scatter(-1, experts, d_gates), z)
    return d_z.to(logits.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, score, order, renormalize, _, _, _, _, scale = inputs
    ctx.rule = GateRule(score, order, renormalize, scale)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _backward(ctx: Any, d_gates: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, experts = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: what is recorded here must have derivatives itself
        d_logits = _backward_by_torch(d_gates, logits, experts, ctx.rule)
    else:
        d_logits = topk_route_backward_op(d_gates, logits, experts, *ctx.rule)
    return d_logits, *(None,) * 9


topk_route_op.register_autograd(_backward, setup_context=_setup)
