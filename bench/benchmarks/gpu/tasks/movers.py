"""The kernels that move memory instead of multiplying matrices, timed beside a copy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ironmoe.bench.benchmarks.roofline import (
    Work,
    combine_work,
    dispatch_work,
    linf_step_work,
    topk_work,
)
from ironmoe.bench.benchmarks.shapes import Problem
from ironmoe.bench.common.timing import Timing, copy, interleaved
from ironmoe.kernels import combine, topk_route
from ironmoe.kernels.attack_step import linf_step
from ironmoe.kernels.dispatch import plan_with_tiles

COPY = "copy"
COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}


class MoverTiming(NamedTuple):
    """kernel: its name; figures: its speed, also as a share of the copy's, and its limit."""

    kernel: str
    timing: Timing
    figures: dict[str, Any]


def time_movers(problem: Problem, rounds: int) -> list[MoverTiming]:
    """Routing, dispatch, combine and the attack's step, in turns with a copy.

    Raises:
        AssertionError: ``topk_route`` disagrees with torch.
    """
    _check_routing(problem)
    device = problem.x.device
    copied = COPIED_BYTES[device.type]
    kernels = _kernels(problem)
    runs = {COPY: copy(copied, device), **{work.kernel: run for work, run in kernels}}
    timings = interleaved(runs, device, rounds)

    copy_rate = 2 * copied / timings[COPY].ms * 1e-6
    found = []
    for work, _ in kernels:
        timing = timings[work.kernel]
        rate = work.bytes / timing.ms * 1e-6
        figures = {
            "gb_per_s": rate,
            "copy_gb_per_s": copy_rate,
            "share_of_copy": rate / copy_rate,
            "limit_ms": work.ms,
        }
        found.append(MoverTiming(work.kernel, timing, figures))

    return found


def _kernels(problem: Problem) -> list[tuple[Work, Callable[[], Any]]]:
    """What each kernel has to do, and a call of it."""
    shape, x = problem.shape, problem.x
    num_experts, itemsize = shape.num_experts, x.dtype.itemsize

    logits = _logits(problem)
    routing = problem.routing._replace(gates=problem.gates.detach())
    dispatch, _ = plan_with_tiles(problem.experts, num_experts, x.dtype)
    rows = torch.randn(shape.rows, shape.dim, device=x.device, dtype=x.dtype)

    point = torch.rand(shape.tokens, shape.dim, device=x.device)
    low, high = point - 0.1, point + 0.1
    alpha = torch.full((shape.tokens,), 0.01, device=x.device)

    return [
        (topk_work(shape), lambda: topk_route(logits, shape.top_k)),
        (dispatch_work(shape), lambda: plan_with_tiles(problem.experts, num_experts, x.dtype)),
        (combine_work(shape, itemsize), lambda: combine(rows, routing, dispatch)),
        (
            linf_step_work(shape, itemsize),
            lambda: linf_step(point, problem.dy, low, high, alpha, image_dtype=x.dtype),
        ),
    ]


def _check_routing(problem: Problem) -> None:
    logits, top_k = _logits(problem), problem.shape.top_k
    expected = logits.softmax(1).topk(top_k).values
    torch.testing.assert_close(topk_route(logits, top_k).gates, expected)


def _logits(problem: Problem) -> torch.Tensor:
    shape = problem.shape
    return torch.randn(shape.tokens, shape.num_experts, device=problem.x.device)
