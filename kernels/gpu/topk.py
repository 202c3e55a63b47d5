"""Top-k routing in one pass over the logits, forward and backward.

The selection is exact: keys are compared as int32, an order-preserving view of their float32 bits,
and the lower expert wins a tie. Columns are laid out (G_PAD, S_PAD), groups by experts of a group;
without groups G_PAD is 1. A program is one warp, so no maximum and no sum waits at a barrier.

Shapes: T tokens, E experts, K choices, G groups of S experts; R rows a program, C = G_PAD · S_PAD
columns, L = C / 4 lists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ironmoe.kernels.gpu.launch import cdiv, launch, next_power_of_2
from ironmoe.kernels.types import ExpertGroups

ELEMENTS = 512  # rows × columns a program
LOWEST = tl.constexpr(-(2**31))  # below every order: columns of no expert, and what was chosen
HIGHEST = tl.constexpr(2**31 - 1)
ORDER_OF_NAN = tl.constexpr(0x7FC00000)  # above every other
ORDER_OF_MINUS_INF = tl.constexpr(-0x7F800001)
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
    """Logits (T, E) of any strides to gates (T, K) float32 and experts (T, K) int32, as
    ``topk_route`` does. E ≤ 1024, K ≤ 32."""
    num_tokens, num_experts = logits.shape
    gates = logits.new_empty((num_tokens, top_k), dtype=torch.float32)
    experts = logits.new_empty((num_tokens, top_k), dtype=torch.int32)
    num_groups, keep, group_score = groups or ExpertGroups(1, 1)
    group_size = num_experts // num_groups
    columns = next_power_of_2(num_groups) * next_power_of_2(group_size)
    rows = max(1, ELEMENTS // columns)
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
        K_PAD=next_power_of_2(top_k),
        G_PAD=next_power_of_2(num_groups),
        S_PAD=next_power_of_2(group_size),
        LISTS=top_k > 2 and columns >= 8,
    )
    return gates, experts


def route_backward(
    d_gates: Tensor,
    logits: Tensor,
    experts: Tensor,
    score: str,
    order: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
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
        scale=float(scale),
        E=num_experts,
        K=experts.shape[1],
        SCORE=score,
        SCORE_FIRST=order == "score_first",
        RENORMALIZE=renormalize,
        R=rows,
        C=columns,
        K_PAD=next_power_of_2(experts.shape[1]),
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
    LISTS: tl.constexpr,
):
    row_r1 = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column_1c = tl.arange(0, G_PAD * S_PAD)[None, :]
    expert_1c = _expert_of(column_1c, S, S_PAD)
    is_expert_1c = (column_1c // S_PAD < G) & (column_1c % S_PAD < S)
    is_row_r1 = row_r1 < num_tokens
    z_rc = _load_logits(logits, row_r1, expert_1c, stride_t, stride_e, is_row_r1 & is_expert_1c)

    # Without a bias a softmax is chosen from before its division, which keeps the order.
    PARTS: tl.constexpr = SCORE_FIRST and SCORE == "softmax" and bias is None
    key_rc = z_rc
    if SCORE_FIRST:
        top_r1, key_rc, total_r1 = _parts(z_rc, SCORE)
        if SCORE == "softmax" and bias is not None:
            key_rc *= 1 / total_r1
    if bias is not None:
        key_rc += tl.load(bias + expert_1c, mask=is_expert_1c, other=0.0).to(tl.float32)
    # One NaN makes the softmax of its whole row NaN.
    is_nan_rc = total_r1 != total_r1 if PARTS else key_rc != key_rc
    POSITIVE: tl.constexpr = SCORE_FIRST and bias is None
    order_rc = tl.where(is_expert_1c, _order(key_rc, is_nan_rc, POSITIVE), LOWEST)
    if KEEP < G:
        order_rc = _in_best_groups(order_rc, G, KEEP, TOP2, G_PAD)
    order_rk, expert_rk = _choose(order_rc, G, S, G_PAD, S_PAD, K, K_PAD, LISTS)

    choice_1k = tl.arange(0, K_PAD)[None, :]
    is_choice_rk = is_row_r1 & (choice_1k < K)
    if bias is None and KEEP == G:
        value_rk = _key(order_rk)
    else:  # a key is not the score, or not the logit: it is read again, from the cache
        value_rk = _load_logits(logits, row_r1, expert_rk, stride_t, stride_e, is_choice_rk)
        if SCORE_FIRST:
            value_rk = _part(value_rk, top_r1, SCORE)
    if SCORE_FIRST:
        gate_rk = tl.where(choice_1k < K, value_rk, 0.0)
    else:
        _, gate_rk, total_r1 = _parts(tl.where(choice_1k < K, value_rk, -float("inf")), SCORE)
    if SCORE == "softmax":
        gate_rk *= 1 / total_r1
    if RENORMALIZE:
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
    # what is padding or dropped has the logit -inf: score 0, gradient 0
    is_choice_rk = expert_rk < E
    z_rk = _load_logits(logits, row_r1, expert_rk, stride_t, stride_e, is_choice_rk)
    d_score_rk = scale * tl.load(d_gates + row_r1 * K + choice_1k, mask=is_choice_rk, other=0.0).to(
        tl.float32
    )

    # Of a softmax over all experts every logit has a gradient; of the rest, only those chosen.
    d_z_rc = tl.zeros((R, C), tl.float32)
    if SCORE == "softmax" and SCORE_FIRST:
        z_rc = _load_logits(logits, row_r1, expert_1c, stride_t, stride_e, is_logit_rc)
        top_r1, part_rc, total_r1 = _parts(z_rc, SCORE)
        score_rk = _part(z_rk, top_r1, SCORE)
    else:
        top_r1, score_rk, total_r1 = _parts(z_rk, SCORE)
    if SCORE == "softmax":
        score_rk *= 1 / total_r1
    if RENORMALIZE:
        sum_r1 = _sum(score_rk, is_choice_rk)
        factor_r1 = 1 / tl.maximum(sum_r1, TINY)
        mean_r1 = factor_r1 * _sum(d_score_rk * score_rk, is_choice_rk)
        d_score_rk = factor_r1 * (d_score_rk - tl.where(sum_r1 >= TINY, mean_r1, 0.0))
    if SCORE == "softmax":
        mean_r1 = _sum(d_score_rk * score_rk, is_choice_rk)
        d_z_rk = score_rk * (d_score_rk - mean_r1)
        if SCORE_FIRST:
            d_z_rc = part_rc * (-mean_r1 / total_r1)
    elif SCORE == "sigmoid":
        d_z_rk = d_score_rk * score_rk * (1 - score_rk)
    else:
        d_z_rk = d_score_rk * tl.sigmoid(z_rk) / (2 * tl.maximum(score_rk, TINY))

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
def _parts(z, SCORE: tl.constexpr):
    """(largest of each row, ``_part``, its sum): a softmax is part / sum."""
    top = tl.max(z, 1, keep_dims=True)
    part = _part(z, top, SCORE)
    return top, part, tl.sum(part, 1, keep_dims=True)


@triton.jit
def _part(z, top, SCORE: tl.constexpr):
    """The score of each logit; of a softmax what its sum is still to divide."""
    if SCORE == "softmax":
        return tl.exp(z - top)
    if SCORE == "sigmoid":
        return tl.sigmoid(z)
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    # log1p(e): log(u) / (u - 1) errs in u and in log(u) alike, and the two errors cancel.
    log1p = tl.where(u == 1, e, e * (tl.log(u) / (u - 1)))
    return tl.sqrt_rn(tl.maximum(z, 0.0) + log1p)


@triton.jit
def _sum(values_rk, is_choice_rk):
    """The sum over the choices.

    Without the selection a product would be fused into the first addition. A thread would then add
    its own product, not rounded, to its neighbour's, which is rounded; and threads would not agree
    on the sum.
    """
    return tl.sum(tl.where(is_choice_rk, values_rk, 0.0), 1, keep_dims=True)


@triton.jit
def _expert_of(column, S: tl.constexpr, S_PAD: tl.constexpr):
    return column // S_PAD * S + column % S_PAD


@triton.jit
def _order(key, is_nan, POSITIVE: tl.constexpr):
    """int32 that compares like the float32 key. NaN is the largest key, and -0.0 is 0.0.

    POSITIVE: the caller knows that no key is -0.0 or less.
    """
    bits = key.to(tl.int32, bitcast=True)
    if not POSITIVE:
        bits = tl.where(key == 0, 0, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return tl.where(is_nan, ORDER_OF_NAN, bits)


@triton.jit
def _key(order):
    """The float32 key."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _choose(
    order_rc, G: tl.constexpr, S: tl.constexpr, G_PAD: tl.constexpr, S_PAD: tl.constexpr,
    K: tl.constexpr, K_PAD: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """The K largest (R, K_PAD), and their experts.

    K times the largest key is taken, and of equal keys the one of the lowest expert. With LISTS
    every four neighbours are sorted first. Then only the largest of the four takes part, and when
    it is taken, the next one takes its place.
    """
    R: tl.constexpr = order_rc.shape[0]
    C: tl.constexpr = order_rc.shape[1]
    choice_1k = tl.arange(0, K_PAD)[None, :]
    order_rk = tl.zeros((R, K_PAD), tl.int32)
    expert_rk = tl.zeros((R, K_PAD), tl.int32)
    if LISTS:
        L: tl.constexpr = C // 4
        first_1l = 4 * tl.arange(0, L)[None, :]
        even, odd = order_rc.reshape(R, L, 2, 2).split()
        a, c = even.split()
        b, d = odd.split()
        at_a = tl.broadcast_to(_expert_of(first_1l, S, S_PAD), (R, L))
        at_b = tl.broadcast_to(_expert_of(first_1l + 1, S, S_PAD), (R, L))
        at_c = tl.broadcast_to(_expert_of(first_1l + 2, S, S_PAD), (R, L))
        at_d = tl.broadcast_to(_expert_of(first_1l + 3, S, S_PAD), (R, L))
        # Neighbours change places, and only if the right one is larger: equal ones stay in order.
        a, b, at_a, at_b = _larger_first(a, b, at_a, at_b)
        c, d, at_c, at_d = _larger_first(c, d, at_c, at_d)
        b, c, at_b, at_c = _larger_first(b, c, at_b, at_c)
        a, b, at_a, at_b = _larger_first(a, b, at_a, at_b)
        c, d, at_c, at_d = _larger_first(c, d, at_c, at_d)
        b, c, at_b, at_c = _larger_first(b, c, at_b, at_c)
        for k in range(K):
            best_r1 = tl.max(a, 1, keep_dims=True)
            at_r1 = tl.min(tl.where(a == best_r1, at_a, HIGHEST), 1, keep_dims=True)
            taken = at_a == at_r1
            a, at_a = tl.where(taken, b, a), tl.where(taken, at_b, at_a)
            b, at_b = tl.where(taken, c, b), tl.where(taken, at_c, at_b)
            c, at_c = tl.where(taken, d, c), tl.where(taken, at_d, at_c)
            d = tl.where(taken, LOWEST, d)
            order_rk = tl.where(choice_1k == k, best_r1, order_rk)
            expert_rk = tl.where(choice_1k == k, at_r1, expert_rk)
    else:
        expert_1c = _expert_of(tl.arange(0, C)[None, :], S, S_PAD)
        for k in range(K):
            best_r1 = tl.max(order_rc, 1, keep_dims=True)
            at_r1 = tl.min(tl.where(order_rc == best_r1, expert_1c, HIGHEST), 1, keep_dims=True)
            order_rc = tl.where(expert_1c == at_r1, LOWEST, order_rc)
            order_rk = tl.where(choice_1k == k, best_r1, order_rk)
            expert_rk = tl.where(choice_1k == k, at_r1, expert_rk)
    return order_rk, expert_rk


@triton.jit
def _larger_first(a, b, at_a, at_b):
    swap = b > a
    a, b = tl.where(swap, b, a), tl.where(swap, a, b)
    at_a, at_b = tl.where(swap, at_b, at_a), tl.where(swap, at_a, at_b)
    return a, b, at_a, at_b


@triton.jit
def _in_best_groups(
    order_rc, G: tl.constexpr, KEEP: tl.constexpr, TOP2: tl.constexpr, G_PAD: tl.constexpr
):  # fmt: skip
    """The orders (R, C) of the keys, where an expert outside the KEEP best groups has the key
    -inf."""
    S_PAD: tl.constexpr = order_rc.shape[1] // G_PAD
    order_rgs = order_rc.reshape(order_rc.shape[0], G_PAD, S_PAD)
    best_rg1 = tl.max(order_rgs, 2, keep_dims=True)
    key_rg1 = _key(best_rg1)
    if TOP2:
        s_11s = tl.arange(0, S_PAD)[None, None, :]
        at_rg1 = tl.min(tl.where(order_rgs == best_rg1, s_11s, S_PAD), 2, keep_dims=True)
        key_rg1 += _key(tl.max(tl.where(s_11s == at_rg1, LOWEST, order_rgs), 2, keep_dims=True))
    key_rg = key_rg1.reshape(order_rc.shape[0], G_PAD)
    group_1g = tl.arange(0, G_PAD)[None, :]
    order_rg = tl.where(group_1g < G, _order(key_rg, key_rg != key_rg, False), LOWEST)
    for _ in range(KEEP):
        best_r1 = tl.max(order_rg, 1, keep_dims=True)
        at_r1 = tl.min(tl.where(order_rg == best_r1, group_1g, G_PAD), 1, keep_dims=True)
        order_rg = tl.where(group_1g == at_r1, LOWEST, order_rg)
    # The minimum leaves what is lower still, columns of no expert, as it is.
    limit_rg = tl.where(order_rg == LOWEST, HIGHEST, ORDER_OF_MINUS_INF)
    return tl.minimum(order_rgs, limit_rg[:, :, None]).reshape(order_rc.shape)
