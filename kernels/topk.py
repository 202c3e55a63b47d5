"""Top-k routing: logits to gates and expert choices."""

from typing import NamedTuple

import torch
from torch import Tensor

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
ORDERS = ("score_first", "topk_first")
GROUP_SCORES = ("max", "top2_sum")


class Routing(NamedTuple):
    """Which experts each token takes, and with which weight.

    gates:   (T, K) float32 (float64 for float64 logits), the weight of each choice
    experts: (T, K) int32, best choice first; ``experts == E`` marks a dropped choice, whose gate is 0
    """

    gates: Tensor
    experts: Tensor


class ExpertGroups(NamedTuple):
    """Group-limited selection (DeepSeek-V2/V3): only the best ``keep`` of ``num_groups`` equal groups of experts compete."""

    num_groups: int
    keep: int
    score: str = "top2_sum"


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
        score: "softmax" | "sigmoid" | "sqrtsoftplus" (the square root of softplus).
        order: "score_first" scores all E experts and picks the best (V-MoE, Qwen, DeepSeek);
            "topk_first" picks by logit and scores only the K chosen (Mixtral, gpt-oss).
        renormalize: divide the K gates of a token by their sum.
        selection_bias: (E,), added to what is compared and never to what weighs (DeepSeek-V3's balance bias).
        groups: keep only the best groups of experts before choosing.
        scale: factor on the final gates.

    Returns:
        Routing with gates (T, K), differentiable with respect to ``logits``, and experts (T, K) int32.

    Raises:
        ValueError: an argument outside the values above, or (on CPU, where looking is free) NaN among the logits.
    """
    _check(logits, top_k, score, order, selection_bias, groups)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if order == "score_first":
        scores = _score(z, score)
        experts = _select(scores, top_k, selection_bias, groups)
        gates = scores.gather(-1, experts)
    else:
        experts = _select(z, top_k, selection_bias, groups)
        gates = _score(z.gather(-1, experts), score)
    if renormalize:
        gates = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
    if scale != 1.0:
        gates = gates * scale
    return Routing(gates, experts.to(torch.int32))


def _score(z: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return z.softmax(-1)
    if score == "sigmoid":
        return z.sigmoid()
    return torch.nn.functional.softplus(z).sqrt()


def _select(keys: Tensor, top_k: int, bias: Tensor | None, groups: ExpertGroups | None) -> Tensor:
    """(T, K) int64 indices of the largest keys. A stable sort, because torch.topk does not promise an order for ties."""
    keys = keys.detach()
    if bias is not None:
        keys = keys + bias.detach()
    if groups is not None:
        keys = keys.masked_fill(~_in_kept_groups(keys, groups), float("-inf"))
    return keys.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def _in_kept_groups(keys: Tensor, groups: ExpertGroups) -> Tensor:
    """(T, E) bool: whether the expert's group is among the best ``groups.keep`` of its token."""
    by_group = keys.unflatten(-1, (groups.num_groups, -1))
    members = 1 if groups.score == "max" else min(2, by_group.shape[-1])
    group_keys = by_group.topk(members, dim=-1).values.sum(-1)
    kept = group_keys.sort(dim=-1, descending=True, stable=True).indices[:, : groups.keep]
    mask = torch.zeros_like(group_keys, dtype=torch.bool).scatter_(-1, kept, True)
    return mask.unsqueeze(-1).expand_as(by_group).flatten(-2)


def _check(logits: Tensor, top_k: int, score: str, order: str, bias: Tensor | None, groups: ExpertGroups | None) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be a float tensor (T, E), got {logits.dtype} of shape {tuple(logits.shape)}")
    num_experts = logits.shape[1]
    if score not in SCORES:
        raise ValueError(f"score must be one of {SCORES}, got {score!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    if bias is not None and bias.shape != (num_experts,):
        raise ValueError(f"selection_bias must have shape ({num_experts},), one value an expert, got {tuple(bias.shape)}")
    candidates = num_experts
    if groups is not None:
        if groups.score not in GROUP_SCORES:
            raise ValueError(f"groups.score must be one of {GROUP_SCORES}, got {groups.score!r}")
        if groups.num_groups < 1 or num_experts % groups.num_groups or not 1 <= groups.keep <= groups.num_groups:
            raise ValueError(
                f"groups must split the {num_experts} experts evenly and keep 1 to num_groups of them, got {groups}"
            )
        candidates = num_experts // groups.num_groups * groups.keep
    if not 1 <= top_k <= candidates:
        raise ValueError(f"top_k must be from 1 to {candidates}, the number of experts to choose from, got {top_k}")
    if logits.device.type == "cpu" and not torch.compiler.is_compiling() and bool(logits.isnan().any()):
        token = int(logits.isnan().any(-1).nonzero()[0])
        raise ValueError(
            f"logits must not be NaN, got NaN first at token {token}: the input or the router's weights are not finite"
        )
