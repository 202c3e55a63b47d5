"""The selection of the K largest keys of each row, exact: ties go to the lower expert.

Keys are compared as int32, an order-preserving view of their float32 bits, their *order*.

Shape suffixes: r rows of a program, c columns, k choices, g groups of s experts, l = c / 4 lists;
an axis of length 1 is written as 1.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ironmoe.kernels.gpu.launch import next_power_of_2

LOWEST = tl.constexpr(-(2**31))  # below every order: columns of no expert, and what was chosen
HIGHEST = tl.constexpr(2**31 - 1)
ORDER_OF_NAN = tl.constexpr(0x7FC00000)  # above every other
ORDER_OF_MINUS_INF = tl.constexpr(-0x7F800001)


class Columns(NamedTuple):
    """How experts lie in the columns of a program: groups by experts of a group, both padded to
    powers of two. Without groups there is one."""

    g: int
    s: int
    g_pad: int
    s_pad: int


def columns_of(num_groups: int, group_size: int) -> Columns:
    """The columns of ``num_groups`` groups of ``group_size`` experts."""
    return Columns(num_groups, group_size, next_power_of_2(num_groups), next_power_of_2(group_size))


@triton.jit
def expert_of(column, COLUMNS: tl.constexpr):
    """The expert of a column; what it gives for padding is some other expert."""
    return column // COLUMNS.s_pad * COLUMNS.s + column % COLUMNS.s_pad


@triton.jit
def order_of(key, is_nan, POSITIVE: tl.constexpr):
    """int32 that compares like the float32 key. NaN is the largest key, and -0.0 is 0.0.

    POSITIVE: the caller knows that no key is -0.0 or less.
    """
    bits = key.to(tl.int32, bitcast=True)
    if not POSITIVE:
        bits = tl.where(key == 0, 0, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return tl.where(is_nan, ORDER_OF_NAN, bits)


@triton.jit
def key_of(order):
    """The float32 key."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def choose(
    order_rc,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    LISTS: tl.constexpr,
):
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
        at_a = tl.broadcast_to(expert_of(first_1l, COLUMNS), (R, L))
        at_b = tl.broadcast_to(expert_of(first_1l + 1, COLUMNS), (R, L))
        at_c = tl.broadcast_to(expert_of(first_1l + 2, COLUMNS), (R, L))
        at_d = tl.broadcast_to(expert_of(first_1l + 3, COLUMNS), (R, L))
        # Neighbours change places, and only if the right one is larger: equal ones stay in order.
        a, b, at_a, at_b = larger_first(a, b, at_a, at_b)
        c, d, at_c, at_d = larger_first(c, d, at_c, at_d)
        b, c, at_b, at_c = larger_first(b, c, at_b, at_c)
        a, b, at_a, at_b = larger_first(a, b, at_a, at_b)
        c, d, at_c, at_d = larger_first(c, d, at_c, at_d)
        b, c, at_b, at_c = larger_first(b, c, at_b, at_c)
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
        expert_1c = expert_of(tl.arange(0, C)[None, :], COLUMNS)
        for k in range(K):
            best_r1 = tl.max(order_rc, 1, keep_dims=True)
            at_r1 = tl.min(tl.where(order_rc == best_r1, expert_1c, HIGHEST), 1, keep_dims=True)
            order_rc = tl.where(expert_1c == at_r1, LOWEST, order_rc)
            order_rk = tl.where(choice_1k == k, best_r1, order_rk)
            expert_rk = tl.where(choice_1k == k, at_r1, expert_rk)
    return order_rk, expert_rk


@triton.jit
def larger_first(a, b, at_a, at_b):
    swap = b > a
    first, second = tl.where(swap, b, a), tl.where(swap, a, b)
    at_first, at_second = tl.where(swap, at_b, at_a), tl.where(swap, at_a, at_b)
    return first, second, at_first, at_second


@triton.jit
def in_best_groups(order_rc, COLUMNS: tl.constexpr, KEEP: tl.constexpr, TOP2: tl.constexpr):
    """The orders (R, C) of the keys, where an expert outside the KEEP best groups has the key
    -inf."""
    G_PAD: tl.constexpr = COLUMNS.g_pad
    S_PAD: tl.constexpr = COLUMNS.s_pad
    order_rgs = order_rc.reshape(order_rc.shape[0], G_PAD, S_PAD)
    best_rg1 = tl.max(order_rgs, 2, keep_dims=True)
    key_rg1 = key_of(best_rg1)
    if TOP2:
        s_11s = tl.arange(0, S_PAD)[None, None, :]
        at_rg1 = tl.min(tl.where(order_rgs == best_rg1, s_11s, S_PAD), 2, keep_dims=True)
        key_rg1 += key_of(tl.max(tl.where(s_11s == at_rg1, LOWEST, order_rgs), 2, keep_dims=True))
    key_rg = key_rg1.reshape(order_rc.shape[0], G_PAD)
    group_1g = tl.arange(0, G_PAD)[None, :]
    order_rg = tl.where(group_1g < COLUMNS.g, order_of(key_rg, key_rg != key_rg, False), LOWEST)
    for _ in range(KEEP):
        best_r1 = tl.max(order_rg, 1, keep_dims=True)
        at_r1 = tl.min(tl.where(order_rg == best_r1, group_1g, G_PAD), 1, keep_dims=True)
        order_rg = tl.where(group_1g == at_r1, LOWEST, order_rg)
    # The minimum leaves what is lower still, columns of no expert, as it is.
    limit_rg = tl.where(order_rg == LOWEST, HIGHEST, ORDER_OF_MINUS_INF)
    return tl.minimum(order_rgs, limit_rg[:, :, None]).reshape(order_rc.shape)
