"""Top-k routing in one pass over the logits, forward and backward.

The selection is exact: each key becomes one int64, an order-preserving view of its float32 bits above the inverted expert
index. All keys of a token are then distinct, the largest is the best with ties to the lower expert, and the next best is the
largest one below it. Columns are laid out (G_PAD, S_PAD), groups by experts of a group; without groups G_PAD is 1.

Shapes: T tokens, E experts, K choices, G groups of S experts; R rows a program, C = G_PAD · S_PAD columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ironmoe.kernels.gpu.launch import launch
from ironmoe.kernels.topk import ExpertGroups

ELEMENTS = 2048  # rows × columns a program, where a row leaves a choice

LOWEST = tl.constexpr(-(2**63))  # below every packed key: columns of no expert
HIGHEST = tl.constexpr(2**63 - 1)  # above every packed key
ORDER_OF_NAN = tl.constexpr(0x7FC00000)
MINUS_INF = tl.constexpr(-0x7F800001 << 32)  # the key -inf, packed without its low half
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def route(
    logits: Tensor,
    top_k: int,
    score: str,
    order: str,
    renormalize: bool,
    selection_bias: Tensor | None,
    groups: ExpertGroups | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Logits (T, E) of any strides to gates (T, K) float32 and experts (T, K) int32, as ``topk_route`` does. E ≤ 1024, K ≤ 32."""
    num_tokens, num_experts = logits.shape
    gates = logits.new_empty((num_tokens, top_k), dtype=torch.float32)
    experts = logits.new_empty((num_tokens, top_k), dtype=torch.int32)
    num_groups, keep, group_score = groups or ExpertGroups(1, 1)
    group_size = num_experts // num_groups
    columns = triton.next_power_of_2(num_groups) * triton.next_power_of_2(group_size)
    rows = max(1, ELEMENTS // columns)
    launch(
        route_kernel,
        triton.cdiv(num_tokens, rows),
        logits=logits,
        bias=None if selection_bias is None else selection_bias.contiguous(),
        gates=gates,
        experts=experts,
        num_tokens=num_tokens,
        stride_t=logits.stride(0),
        stride_e=logits.stride(1),
        scale=float(scale),
        K=top_k,
        G=num_groups,
        S=group_size,
        KEEP=keep,
        TOP2=group_score == "top2_sum" and group_size > 1,
        SCORE=score,
        SCORE_FIRST=order == "score_first",
        RENORMALIZE=renormalize,
        R=rows,
        K_PAD=triton.next_power_of_2(top_k),
        G_PAD=triton.next_power_of_2(num_groups),
        S_PAD=triton.next_power_of_2(group_size),
    )
    return gates, experts


def route_backward(
    d_gates: Tensor, logits: Tensor, experts: Tensor, score: str, order: str, renormalize: bool, scale: float
) -> Tensor:
    """d_gates (T, K) and the experts (T, K) chosen to d_logits (T, E). Scores are computed anew; ``experts == E`` adds nothing."""
    num_tokens, num_experts = logits.shape
    d_logits = logits.new_empty(logits.shape)
    columns = triton.next_power_of_2(num_experts)
    rows = max(1, ELEMENTS // columns)
    launch(
        route_backward_kernel,
        triton.cdiv(num_tokens, rows),
        d_gates=d_gates.contiguous(),
        logits=logits,
        experts=experts.contiguous(),
        d_logits=d_logits,
        num_tokens=num_tokens,
        stride_t=logits.stride(0),
        stride_e=logits.stride(1),
        scale=float(scale),
        E=num_experts,
        K=experts.shape[1],
        SCORE=score,
        SCORE_FIRST=order == "score_first",
        RENORMALIZE=renormalize,
        R=rows,
        C=columns,
        K_PAD=triton.next_power_of_2(experts.shape[1]),
    )
    return d_logits


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
    K: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    KEEP: tl.constexpr,
    TOP2: tl.constexpr,
    SCORE: tl.constexpr,
    SCORE_FIRST: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    R: tl.constexpr,
    K_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    S_PAD: tl.constexpr,
):
    row_r1 = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column_1c = tl.arange(0, G_PAD * S_PAD)[None, :]
    expert_1c = column_1c // S_PAD * S + column_1c % S_PAD
    is_expert_1c = (column_1c // S_PAD < G) & (column_1c % S_PAD < S)
    is_row_r1 = row_r1 < num_tokens
    z_rc = _load_logits(logits, row_r1, expert_1c, stride_t, stride_e, is_row_r1 & is_expert_1c)

    key_rc = z_rc
    if SCORE_FIRST:
        top_r1, total_r1 = _softmax_terms(z_rc)
        key_rc = _score(z_rc, top_r1, total_r1, SCORE)
    if bias is not None:
        key_rc += tl.load(bias + expert_1c, mask=is_expert_1c, other=0.0).to(tl.float32)
    packed_rc = tl.where(is_expert_1c, _pack(key_rc, G * S - 1 - expert_1c), LOWEST)
    if KEEP < G:
        packed_rc = _keep_best_groups(packed_rc, G, KEEP, TOP2, G_PAD)

    choice_1k = tl.arange(0, K_PAD)[None, :]
    expert_rk = tl.zeros((R, K_PAD), tl.int32)
    best_r1 = tl.full((R, 1), HIGHEST, tl.int64)
    for k in range(K):
        best_r1 = tl.max(tl.where(packed_rc < best_r1, packed_rc, LOWEST), 1, keep_dims=True)
        expert_rk = tl.where(choice_1k == k, G * S - 1 - best_r1.to(tl.int32), expert_rk)

    # The K logits are read again, from the cache: cheaper than carrying the scores through the K maxima.
    is_choice_rk = is_row_r1 & (choice_1k < K)
    z_rk = _load_logits(logits, row_r1, expert_rk, stride_t, stride_e, is_choice_rk)
    if not SCORE_FIRST:
        top_r1, total_r1 = _softmax_terms(z_rk)
    gate_rk = _score(z_rk, top_r1, total_r1, SCORE)
    if RENORMALIZE:
        gate_rk /= tl.maximum(tl.sum(gate_rk, 1, keep_dims=True), TINY)
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
    E: tl.constexpr,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    SCORE_FIRST: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K_PAD: tl.constexpr,
):
    row_r1 = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    expert_1c = tl.arange(0, C)[None, :]
    choice_1k = tl.arange(0, K_PAD)[None, :]
    is_row_r1 = row_r1 < num_tokens
    is_logit_rc = is_row_r1 & (expert_1c < E)
    expert_rk = tl.load(experts + row_r1 * K + choice_1k, mask=is_row_r1 & (choice_1k < K), other=E)
    is_choice_rk = expert_rk < E  # what is padding or dropped has the logit -inf: score 0, gradient 0
    z_rk = _load_logits(logits, row_r1, expert_rk, stride_t, stride_e, is_choice_rk)
    d_score_rk = scale * tl.load(d_gates + row_r1 * K + choice_1k, mask=is_choice_rk, other=0.0).to(tl.float32)

    if SCORE == "softmax" and SCORE_FIRST:
        z_rc = _load_logits(logits, row_r1, expert_1c, stride_t, stride_e, is_logit_rc)
        top_r1, total_r1 = _softmax_terms(z_rc)
    else:
        top_r1, total_r1 = _softmax_terms(z_rk)
    score_rk = _score(z_rk, top_r1, total_r1, SCORE)
    if RENORMALIZE:
        sum_r1 = tl.sum(score_rk, 1, keep_dims=True)
        divisor_r1 = tl.maximum(sum_r1, TINY)
        mean_r1 = tl.sum(d_score_rk * (score_rk / divisor_r1), 1, keep_dims=True)
        d_score_rk = (d_score_rk - tl.where(sum_r1 >= TINY, mean_r1, 0.0)) / divisor_r1

    d_z_rc = tl.zeros((R, C), tl.float32)
    if SCORE == "softmax":
        mean_r1 = tl.sum(d_score_rk * score_rk, 1, keep_dims=True)
        d_z_rk = score_rk * (d_score_rk - mean_r1)
        if SCORE_FIRST:
            d_z_rc = -mean_r1 * _score(z_rc, top_r1, total_r1, SCORE)
    elif SCORE == "sigmoid":
        d_z_rk = d_score_rk * score_rk * (1 - score_rk)
    else:
        d_z_rk = d_score_rk * tl.sigmoid(z_rk) / (2 * tl.maximum(score_rk, TINY))

    for k in range(K):
        expert_r1 = tl.sum(tl.where(choice_1k == k, expert_rk, 0), 1, keep_dims=True)
        d_z_r1 = tl.sum(tl.where(choice_1k == k, d_z_rk, 0.0), 1, keep_dims=True)
        d_z_rc = tl.where(expert_1c == expert_r1, d_z_r1, d_z_rc)
    tl.store(d_logits + row_r1 * E + expert_1c, d_z_rc.to(d_logits.dtype.element_ty), mask=is_logit_rc)


@triton.jit
def _load_logits(logits, row, expert, stride_t, stride_e, mask):
    return tl.load(logits + row * stride_t + expert.to(tl.int64) * stride_e, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def _softmax_terms(z):
    """The largest of each row and the sum of exp(z - largest)."""
    top = tl.max(z, 1, keep_dims=True)
    return top, tl.sum(tl.exp(z - top), 1, keep_dims=True)


@triton.jit
def _score(z, top, total, SCORE: tl.constexpr):
    if SCORE == "softmax":
        return tl.exp(z - top) / total
    if SCORE == "sigmoid":
        return tl.sigmoid(z)
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    # log1p(e): log(u) / (u - 1) errs in u and in log(u) alike, and the two errors cancel.
    log1p = tl.where(u == 1, e, e * (tl.log(u) / (u - 1)))
    return tl.sqrt_rn(tl.maximum(z, 0.0) + log1p)


@triton.jit
def _pack(key, low):
    """int64 that compares like the float32 key, then like ``low``. NaN is the largest key, and -0.0 is 0.0."""
    bits = tl.where(key == 0, 0.0, key).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(key != key, ORDER_OF_NAN, order)
    return (order.to(tl.int64) << 32) | low


@triton.jit
def _unpack(packed):
    """The float32 key."""
    order = (packed >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _keep_best_groups(packed_rc, G: tl.constexpr, KEEP: tl.constexpr, TOP2: tl.constexpr, G_PAD: tl.constexpr):
    """Packed keys (R, C) with the key -inf for experts outside the KEEP best groups."""
    packed_rgs = tl.reshape(packed_rc, (packed_rc.shape[0], G_PAD, packed_rc.shape[1] // G_PAD))
    best_rg = tl.max(packed_rgs, 2)
    key_rg = _unpack(best_rg)
    if TOP2:
        key_rg += _unpack(tl.max(tl.where(packed_rgs < best_rg[:, :, None], packed_rgs, LOWEST), 2))
    group_1g = tl.arange(0, G_PAD)[None, :]
    group_rg = tl.where(group_1g < G, _pack(key_rg, G - 1 - group_1g), LOWEST)
    last_r1 = tl.full((packed_rc.shape[0], 1), HIGHEST, tl.int64)
    for _ in range(KEEP):
        last_r1 = tl.max(tl.where(group_rg < last_r1, group_rg, LOWEST), 1, keep_dims=True)
    # The minimum leaves what is lower still, columns of no expert, as it is.
    out_rgs = MINUS_INF | (packed_rgs & 0xFFFFFFFF)
    limit_rgs = tl.where((group_rg >= last_r1)[:, :, None], HIGHEST, out_rgs)
    return tl.reshape(tl.minimum(packed_rgs, limit_rgs), packed_rc.shape)
