"""The operations by themselves, ready to be timed: Triton kernels on a GPU, their torch twins
elsewhere."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.bench.benchmarks.passes import DX, FORWARD, FULL, INFERENCE, PASSES
from ironmoe.bench.benchmarks.peers import ironmoe
from ironmoe.bench.benchmarks.shapes import Problem, Shape, make_problem
from ironmoe.bench.common.dtypes import dtype_name
from ironmoe.bench.common.radii import USUAL_EPS
from ironmoe.kernels import combine, grouped_matmul, plan_dispatch, topk_route
from ironmoe.kernels.attack_step import l2_step, linf_step

DTYPES = (torch.float32, torch.bfloat16)
SCORES = ("softmax", "sigmoid")
IMAGES_ON_GPU, IMAGES = (256, 3, 224, 224), (16, 3, 64, 64)
Work = Callable[[], Any]


class Case(NamedTuple):
    """One operation on one layer, or on images.

    variant: a score, a pass or a norm; shape: of the layer, None for images; dtype: of what is
    multiplied.
    """

    operation: str
    variant: str
    shape: Shape | None
    dtype: torch.dtype
    device: torch.device

    @property
    def sizes(self) -> tuple[int, ...]:
        """(T, d, n, E, K), or the shape of the images."""
        if self.shape is not None:
            return self.shape.sizes
        return IMAGES_ON_GPU if self.device.type == "cuda" else IMAGES

    @property
    def key(self) -> dict[str, Any]:
        """What tells its row from others."""
        return {
            "operation": self.operation,
            "variant": self.variant,
            "shape": self.sizes,
            "dtype": dtype_name(self.dtype),
        }

    @property
    def name(self) -> str:
        """Of the layer."""
        return "images" if self.shape is None else self.shape.name

    @property
    def label(self) -> str:
        parts = (self.operation, self.variant, self.name, dtype_name(self.dtype))
        return " ".join(part for part in parts if part)

    def work(self) -> Work:
        """The call to be timed, on the same numbers whatever was measured before."""
        torch.manual_seed(0)
        return OPERATIONS[self.operation](self)

    def problem(self) -> Problem:
        assert self.shape is not None
        return make_problem(self.shape, "uniform", self.dtype, self.device)


def cases(
    operations: tuple[str, ...], shapes: tuple[Shape, ...], device: torch.device
) -> Iterator[Case]:
    """Every case of the operations, in this order."""
    for operation in operations:
        variants = VARIANTS.get(operation, ("",))
        of_images = operation == "attack_step"
        dtypes = DTYPES[:1] if operation in FLOAT32_ALONE else DTYPES
        for shape in (None,) if of_images else shapes:
            for variant in variants:
                for dtype in dtypes:
                    yield Case(operation, variant, shape, dtype, device)


def _logits(case: Case) -> Tensor:
    assert case.shape is not None
    return torch.randn(case.shape.tokens, case.shape.num_experts, device=case.device)


def _topk_route(case: Case) -> Work:
    assert case.shape is not None
    logits, top_k = _logits(case), case.shape.top_k
    return lambda: topk_route(logits, top_k, score=case.variant)


def _plan_dispatch(case: Case) -> Work:
    assert case.shape is not None
    experts = topk_route(_logits(case), case.shape.top_k).experts
    num_experts = case.shape.num_experts
    return lambda: plan_dispatch(experts, num_experts)


def _grouped_matmul(case: Case) -> Work:
    problem = case.problem()
    offsets = plan_dispatch(problem.experts, problem.shape.num_experts).offsets
    rows, weight = _rows(problem), problem.w_in.detach()
    return lambda: grouped_matmul(rows, weight, offsets)


def _combine(case: Case) -> Work:
    problem = case.problem()
    dispatch = plan_dispatch(problem.experts, problem.shape.num_experts)
    rows, routing = _rows(problem), problem.routing._replace(gates=problem.gates.detach())
    return lambda: combine(rows, routing, dispatch)


def _rows(problem: Problem) -> Tensor:
    """(R, D), sorted by expert."""
    x = problem.x
    return torch.randn(problem.shape.rows, problem.shape.dim, device=x.device, dtype=x.dtype)


def _expert_mlp(case: Case) -> Work:
    return PASSES[case.variant](ironmoe, case.problem())


def _attack_step(case: Case) -> Work:
    point = torch.rand(case.sizes, device=case.device)
    grad = torch.randn(case.sizes, device=case.device).to(case.dtype)
    return FUSED_STEPS[case.variant](point, grad)


def _linf(point: Tensor, grad: Tensor) -> Work:
    low, high = (point - USUAL_EPS).clamp_min(0), (point + USUAL_EPS).clamp_max(1)
    alpha = torch.full((len(point),), 0.01, device=point.device)
    return lambda: linf_step(point, grad, low, high, alpha, image_dtype=grad.dtype)


def _l2(point: Tensor, grad: Tensor) -> Work:
    eps, alpha = (torch.full((len(point),), value, device=point.device) for value in (1.0, 0.1))
    return lambda: l2_step(point, grad, point, eps, (0.0, 1.0), alpha, image_dtype=grad.dtype)


FUSED_STEPS = {"Linf": _linf, "L2": _l2}
"""The norms with a kernel for a step of an attack → that step, ready to be called."""
OPERATIONS: dict[str, Callable[[Case], Work]] = {
    "topk_route": _topk_route,
    "plan_dispatch": _plan_dispatch,
    "grouped_matmul": _grouped_matmul,
    "combine": _combine,
    "expert_mlp": _expert_mlp,
    "attack_step": _attack_step,
}
VARIANTS: dict[str, tuple[str, ...]] = {
    "topk_route": SCORES,
    "expert_mlp": (INFERENCE, FORWARD, DX, FULL),
    "attack_step": tuple(FUSED_STEPS),
}
FLOAT32_ALONE = ("topk_route", "plan_dispatch")  # they have no products
