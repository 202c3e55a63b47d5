"""Top-k routing in one pass over the logits, forward and backward.

A program is one warp, so no maximum and no sum waits at a barrier. ``selection`` says how the best
experts are found, ``scores`` what their logits are worth.

Shape suffixes: r rows (tokens) of a program, c columns (experts and padding), k choices. T tokens,
E experts, K choices as everywhere.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ironmoe.kernels.gpu.floats import TINY
from ironmoe.kernels.gpu.launch import cdiv, launch, next_power_of_2
from ironmoe.kernels.gpu.scores import score_backward, score_part, score_parts
from ironmoe.kernels.gpu.selection import (
    LOWEST,
    choose,
    columns_of,
    expert_of,
    in_best_groups,
    key_of,
    order_of,
)
from ironmoe.kernels.scores import get_score
from ironmoe.kernels.types import ExpertGroups, GateRule

ELEMENTS = 512  # rows × columns a program


class Rule(NamedTuple):
    """What the compiler is told of a ``GateRule``. joint, nonnegative: see ``Score``."""

    score: str
    joint: bool
    nonnegative: bool
    score_first: bool
    renormalize: bool


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    logits,
    bias,
    gates,
    experts,
    num_tokens,
    stride_t,
    stride_e,
    scale,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
    TOP2: tl.constexpr,
    LISTS: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    R: tl.constexpr,
):
    """Reads each logit once; writes gates and experts. KEEP of the groups compete, each by its best
    expert or, with TOP2, its best two; LISTS: see ``choose``."""
    SCORE: tl.constexpr = RULE.score
    SCORE_FIRST: tl.constexpr = RULE.score_first
    row_r1 = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column_1c = tl.arange(0, COLUMNS.g_pad * COLUMNS.s_pad)[None, :]
    expert_1c = expert_of(column_1c, COLUMNS)
    in_group_1c = column_1c % COLUMNS.s_pad < COLUMNS.s
    is_expert_1c = (column_1c // COLUMNS.s_pad < COLUMNS.g) & in_group_1c
    is_row_r1 = row_r1 < num_tokens
    z_rc = _load_logits(logits, row_r1, expert_1c, stride_t, stride_e, is_row_r1 & is_expert_1c)

    # Without a bias a softmax is chosen from before its division, which keeps the order.
    PARTS: tl.constexpr = SCORE_FIRST and RULE.joint and bias is None
    key_rc = z_rc
    if SCORE_FIRST:
        top_r1, key_rc, total_r1 = score_parts(z_rc, SCORE)
        if RULE.joint and bias is not None:
            key_rc *= 1 / total_r1
    if bias is not None:
        key_rc += tl.load(bias + expert_1c, mask=is_expert_1c, other=0.0).to(tl.float32)

    # One NaN makes the softmax of its whole row NaN.
    is_nan_rc = total_r1 != total_r1 if PARTS else key_rc != key_rc
    POSITIVE: tl.constexpr = SCORE_FIRST and RULE.nonnegative and bias is None
    order_rc = tl.where(is_expert_1c, order_of(key_rc, is_nan_rc, POSITIVE), LOWEST)
    if COLUMNS.g > KEEP:
        order_rc = in_best_groups(order_rc, COLUMNS, KEEP, TOP2)
    order_rk, expert_rk = choose(order_rc, COLUMNS, K, K_PAD, LISTS)

    choice_1k = tl.arange(0, K_PAD)[None, :]
    is_choice_rk = is_row_r1 & (choice_1k < K)
    if bias is None and COLUMNS.g == KEEP:
        value_rk = key_of(order_rk)
    else:  # a key is not the score, or not the logit: it is read again, from the cache
        value_rk = _load_logits(logits, row_r1, expert_rk, stride_t, stride_e, is_choice_rk)
        if SCORE_FIRST:
            value_rk = score_part(value_rk, top_r1, SCORE)

    if SCORE_FIRST:
        gate_rk = tl.where(choice_1k < K, value_rk, 0.0)
    else:
        _, gate_rk, total_r1 = score_parts(tl.where(choice_1k < K, value_rk, -float("inf")), SCORE)
    if RULE.joint:
        gate_rk *= 1 / total_r1
    if RULE.renormalize:
        gate_rk *= 1 / tl.maximum(_sum(gate_rk, is_choice_rk), TINY)
    tl.store(gates + row_r1 * K + choice_1k, gate_rk * scale, mask=is_choice_rk)
    tl.store(experts + row_r1 * K + choice_1k, expert_rk, mask=is_choice_rk)


@triton.jit(do_not_specialize=["num_tokens"])
def route_backward_kernel(
    d_gates,
    logits,
    experts,
    d_logits,
    num_tokens,
    stride_t,
    stride_e,
    scale,
    RULE: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    R: tl.constexpr,
):
    """Reads the chosen logits, and all of them where each has a gradient; writes every element of
    d_logits."""
    SCORE: tl.constexpr = RULE.score
    ALL: tl.constexpr = RULE.joint and RULE.score_first
    row_r1 = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    expert_1c = tl.arange(0, C)[None, :]
    choice_1k = tl.arange(0, K_PAD)[None, :]
    is_row_r1 = row_r1 < num_tokens
    is_logit_rc = is_row_r1 & (expert_1c < E)
    expert_rk = tl.load(experts + row_r1 * K + choice_1k, mask=is_row_r1 & (choice_1k < K), other=E)
    # what is padding or dropped has the logit -inf: score 0, gradient 0
    is_choice_rk = expert_rk < E
    z_rk = _load_logits(logits, row_r1, expert_rk, stride_t, stride_e, is_choice_rk)
    d_score_rk = scale * tl.load(d_gates + row_r1 * K + choice_1k, mask=is_choice_rk, other=0.0).to(
        tl.float32
    )

    # ALL: of a softmax over all experts every logit has a gradient; of the rest, only those chosen.
    d_z_rc = tl.zeros((R, C), tl.float32)
    if ALL:
        z_rc = _load_logits(logits, row_r1, expert_1c, stride_t, stride_e, is_logit_rc)
        top_r1, part_rc, total_r1 = score_parts(z_rc, SCORE)
        score_rk = score_part(z_rk, top_r1, SCORE)
    else:
        top_r1, score_rk, total_r1 = score_parts(z_rk, SCORE)
    if RULE.joint:
        score_rk *= 1 / total_r1
    if RULE.renormalize:
        sum_r1 = _sum(score_rk, is_choice_rk)
        factor_r1 = 1 / tl.maximum(sum_r1, TINY)
        mean_r1 = factor_r1 * _sum(d_score_rk * score_rk, is_choice_rk)
        d_score_rk = factor_r1 * (d_score_rk - tl.where(sum_r1 >= TINY, mean_r1, 0.0))
    if RULE.joint:
        mean_r1 = _sum(d_score_rk * score_rk, is_choice_rk)
        d_z_rk = score_rk * (d_score_rk - mean_r1)
        if ALL:
            d_z_rc = part_rc * (-mean_r1 / total_r1)
    else:
        d_z_rk = score_backward(d_score_rk, z_rk, score_rk, SCORE)

    # The chosen are written over what was written before: the barrier orders the two.
    d_row_r1 = d_logits + row_r1 * E
    tl.store(d_row_r1 + expert_1c, d_z_rc.to(d_logits.dtype.element_ty), mask=is_logit_rc)
    tl.debug_barrier()
    tl.store(d_row_r1 + expert_rk, d_z_rk.to(d_logits.dtype.element_ty), mask=is_choice_rk)


@triton.jit
def _load_logits(logits, row, expert, stride_t, stride_e, mask):
    return tl.load(
        logits + row * stride_t + expert.to(tl.int64) * stride_e, mask=mask, other=-float("inf")
    ).to(tl.float32)


@triton.jit
def _sum(values_rk, is_choice_rk):
    """The sum over the choices.

    Without the selection a product would be fused into the first addition. A thread would then add
    its own product, not rounded, to its neighbour's, which is rounded; and threads would not agree
    on the sum.
    """
    return tl.sum(tl.where(is_choice_rk, values_rk, 0.0), 1, keep_dims=True)


def route(
    logits: Tensor,
    top_k: int,
    rule: GateRule,
    selection_bias: Tensor | None = None,
    groups: ExpertGroups | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (T, E) of any strides to gates (T, K) float32 and experts (T, K) int32, as
    ``topk_route`` does. E ≤ 1024, K ≤ 32."""
    num_tokens, num_experts = logits.shape
    gates = logits.new_empty((num_tokens, top_k), dtype=torch.float32)
    experts = logits.new_empty((num_tokens, top_k), dtype=torch.int32)

    num_groups, keep, group_score = groups or ExpertGroups(1, 1)
    columns = columns_of(num_groups, num_experts // num_groups)
    width = columns.g_pad * columns.s_pad
    rows = max(1, ELEMENTS // width)
    launch(
        route_kernel,
        cdiv(num_tokens, rows),
        num_warps=1,
        logits=logits,
        bias=None if selection_bias is None else selection_bias.contiguous(),
        gates=gates,
        experts=experts,
        num_tokens=num_tokens,
        stride_t=logits.stride(0),
        stride_e=logits.stride(1),
        scale=float(rule.scale),
        RULE=_rule(rule),
        COLUMNS=columns,
        KEEP=keep,
        TOP2=group_score == "top2_sum" and columns.s > 1,
        LISTS=top_k > 2 and width >= 8,
        K=top_k,
        K_PAD=next_power_of_2(top_k),
        R=rows,
    )
    return gates, experts


def route_backward(d_gates: Tensor, logits: Tensor, experts: Tensor, rule: GateRule) -> Tensor:
    """d_gates (T, K) and the experts (T, K) chosen to d_logits (T, E). Scores are computed anew;
    ``experts == E`` adds nothing."""
    num_tokens, num_experts = logits.shape
    d_logits = logits.new_empty(logits.shape)

    columns = next_power_of_2(num_experts)
    rows = max(1, ELEMENTS // columns)
    launch(
        route_backward_kernel,
        cdiv(num_tokens, rows),
        num_warps=1,
        d_gates=d_gates.contiguous(),
        logits=logits,
        experts=experts.contiguous(),
        d_logits=d_logits,
        num_tokens=num_tokens,
        stride_t=logits.stride(0),
        stride_e=logits.stride(1),
        scale=float(rule.scale),
        RULE=_rule(rule),
        E=num_experts,
        C=columns,
        K=experts.shape[1],
        K_PAD=next_power_of_2(experts.shape[1]),
        R=rows,
    )
    return d_logits


def _rule(rule: GateRule) -> Rule:
    score = get_score(rule.score)
    return Rule(
        score=rule.score,
        joint=score.joint,
        nonnegative=score.nonnegative,
        score_first=rule.order == "score_first",
        renormalize=rule.renormalize,
    )
