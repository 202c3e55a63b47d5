"""Microbenchmarks of each operation, for pytest-benchmark: ``ironmoe bench kernels``, or ``pytest
bench/benchmarks/kernel_benchmarks.py``.

On a GPU the Triton kernels at Qwen3-30B and V-MoE B/16; elsewhere the torch twins at two small
layers.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ironmoe.bench.benchmarks.passes import DX, FORWARD, FULL, INFERENCE, PASSES
from ironmoe.bench.benchmarks.peers import ironmoe
from ironmoe.bench.benchmarks.shapes import SHAPES, Problem, Shape, make_problem
from ironmoe.bench.common.radii import USUAL_EPS
from ironmoe.kernels import combine, grouped_matmul, plan_dispatch, topk_route
from ironmoe.kernels.attack_step import l2_step, linf_step

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SMALL = (
    Shape("small-gated", 512, 256, 256, 16, 4),
    Shape("small-biases", 788, 192, 768, 8, 2, activation="gelu", bias=True),
)
MEASURED = tuple(s for s in SHAPES if s.name in ("qwen3-30b", "vmoe-b16-e8")) if ON_GPU else SMALL
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMAGES = (256, 3, 224, 224) if ON_GPU else (16, 3, 64, 64)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=MEASURED, ids=lambda shape: shape.name)
def problem(request: pytest.FixtureRequest, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    return make_problem(request.param, "uniform", dtype, DEVICE)


@pytest.fixture
def measure(benchmark: Any) -> Callable[[Callable[[], Any]], None]:
    """Time the work under pytest-benchmark; on a GPU until the device is done."""

    def run(work: Callable[[], Any]) -> None:
        def finished() -> None:
            work()
            if ON_GPU:
                torch.cuda.synchronize()

        finished()  # a first call compiles
        benchmark(finished)

    return run


@pytest.mark.benchmark(group="topk_route")
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", MEASURED, ids=lambda shape: shape.name)
def test_topk_route(measure: Any, shape: Shape, score: str) -> None:
    logits = torch.randn(shape.tokens, shape.num_experts, device=DEVICE)
    measure(lambda: topk_route(logits, shape.top_k, score=score))


@pytest.mark.benchmark(group="plan_dispatch")
@pytest.mark.parametrize("shape", MEASURED, ids=lambda shape: shape.name)
def test_plan_dispatch(measure: Any, shape: Shape) -> None:
    experts = topk_route(
        torch.randn(shape.tokens, shape.num_experts, device=DEVICE), shape.top_k
    ).experts
    measure(lambda: plan_dispatch(experts, shape.num_experts))


@pytest.mark.benchmark(group="grouped_matmul")
def test_grouped_matmul(measure: Any, problem: Problem) -> None:
    offsets = plan_dispatch(problem.experts, problem.shape.num_experts).offsets
    rows = torch.randn(problem.shape.rows, problem.shape.dim, device=DEVICE, dtype=problem.x.dtype)
    weight = problem.w_in.detach()
    measure(lambda: grouped_matmul(rows, weight, offsets))


@pytest.mark.benchmark(group="combine")
def test_combine(measure: Any, problem: Problem) -> None:
    dispatch = plan_dispatch(problem.experts, problem.shape.num_experts)
    rows = torch.randn(problem.shape.rows, problem.shape.dim, device=DEVICE, dtype=problem.x.dtype)
    routing = problem.routing._replace(gates=problem.gates.detach())
    measure(lambda: combine(rows, routing, dispatch))


@pytest.mark.benchmark(group="expert_mlp")
@pytest.mark.parametrize("asked", [INFERENCE, FORWARD, DX, FULL])
def test_expert_mlp(measure: Any, problem: Problem, asked: str) -> None:
    measure(PASSES[asked](ironmoe, problem))


def _linf(point: Tensor, grad: Tensor) -> Callable[[], Any]:
    low, high = (point - USUAL_EPS).clamp_min(0), (point + USUAL_EPS).clamp_max(1)
    alpha = torch.full((len(point),), 0.01, device=DEVICE)
    return lambda: linf_step(point, grad, low, high, alpha, image_dtype=grad.dtype)


def _l2(point: Tensor, grad: Tensor) -> Callable[[], Any]:
    eps, alpha = (torch.full((len(point),), value, device=DEVICE) for value in (1.0, 0.1))
    return lambda: l2_step(point, grad, point, eps, (0.0, 1.0), alpha, image_dtype=grad.dtype)


FUSED_STEPS = {"Linf": _linf, "L2": _l2}
"""The norms with a kernel for a step of an attack → that step, ready to be called."""


@pytest.mark.benchmark(group="attack_step")
@pytest.mark.parametrize("norm", FUSED_STEPS)
def test_attack_step(measure: Any, dtype: torch.dtype, norm: str) -> None:
    point = torch.rand(IMAGES, device=DEVICE)
    grad = torch.randn(IMAGES, device=DEVICE).to(dtype)
    measure(FUSED_STEPS[norm](point, grad))
