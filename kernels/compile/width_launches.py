"""Launches at small, odd and large widths: the compiler takes other ways where rows are short,
unaligned or of zero stride.

``usual_launches`` asks what the compiler makes of the block sizes; these ask whether it takes a
kernel at all. The layout of a tile follows from the width of its rows, and a width at which a pass
of the compiler fails need not be one that any published model has.
"""

from collections.abc import Iterator

import torch

from ironmoe.kernels.compile.launches import (
    DTYPES,
    NamedLaunch,
    attack_steps,
    collect,
    expert,
    gates_of,
    index,
    layers,
    meta,
)
from ironmoe.kernels.gpu import combine, dispatch, topk
from ironmoe.kernels.tuning import Chip
from ironmoe.kernels.types import GateRule

WIDTHS = (1, 8, 16, 24, 31, 32, 48, 64, 96)  # of rows; the larger ones are in ``usual_launches``
EXPERT_WIDTHS = (8, 31, 48)  # that TMA takes, unaligned, a multiple of 16 but of no block
PIXELS = (1, 31, 96)
ROUTERS = ((1, 1), (3, 2), (33, 4))  # (E, K)
TOKENS, TOP_K = 30, 4


def every_launch(chip: Chip) -> list[NamedLaunch]:
    """``usual_launches``, and every kernel as it would be launched on ``chip`` at narrow widths,
    each configuration once.
    """
    return collect(chip, layers(), rows(), routers_and_steps(), experts())


def narrow_launches(chip: Chip) -> list[NamedLaunch]:
    """Of ``every_launch`` those at narrow widths."""
    return collect(chip, rows(), routers_and_steps(), experts())


def rows(widths: tuple[int, ...] = WIDTHS) -> Iterator[tuple[str, torch.dtype]]:
    """Combine and its backward, also for a gradient of zero stride: (name, dtype) of each step,
    after it was taken.
    """
    plan, gates = index(TOKENS * TOP_K, TOKENS), gates_of(TOKENS, TOP_K)
    for width in widths:
        for dtype in DTYPES:
            rows_RD = meta(TOKENS * TOP_K, width, dtype=dtype)
            combine.combine(rows_RD, gates, plan[-1])
            dy_TD = meta(TOKENS, width, dtype=dtype)
            combine.combine_backward(dy_TD, rows_RD, gates, *plan, want_rows=True, want_gates=True)
            yield f"width {width}", dtype
            dy_TD = meta(1, width, dtype=dtype).expand(TOKENS, -1)
            combine.combine_backward(dy_TD, rows_RD, gates, *plan, want_rows=True, want_gates=True)
            yield f"width {width}, stride 0", dtype


def routers_and_steps() -> Iterator[tuple[str, torch.dtype]]:
    """Few experts, and images of few pixels."""
    for num_experts, top_k in ROUTERS:
        dispatch.plan(meta(TOKENS, top_k), num_experts)
        logits = meta(TOKENS, num_experts, dtype=torch.float32)
        rule = GateRule(renormalize=True)
        gates, chosen = topk.route(logits, top_k, rule)
        topk.route_backward(gates, logits, chosen, rule)
        yield f"E = {num_experts}, K = {top_k}", torch.float32
    for pixels in PIXELS:
        attack_steps(meta(3, pixels, dtype=torch.float32))
        yield f"{pixels} pixels", torch.bfloat16


def experts(widths: tuple[int, ...] = EXPERT_WIDTHS) -> Iterator[tuple[str, torch.dtype]]:
    """The expert, forward and backward, where x and H are narrow."""
    for width in widths:
        for dtype, num_rows, activation in (
            (torch.bfloat16, 16, "swiglu"),
            (torch.bfloat16, 128, "gelu"),
            (torch.float32, 16, "gelu"),
        ):
            for step in expert(dtype, num_rows, activation, sizes=(width, width), E=4):
                yield f"{step}, width {width}", dtype
