"""The passes of a layer that are timed: inference, forward, the backward passes of attack and
training, and a PGD step in a CUDA graph.

Gates count as inputs: an attack goes through the router, so every backward pass asks for their
gradient too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ironmoe.bench.benchmarks.shapes import Problem
from ironmoe.bench.common.radii import USUAL_EPS
from ironmoe.kernels.attack_step import linf_step

Build = Callable[[Problem], Callable[[], Tensor]]  # the layer of a problem, ready to be called
INFERENCE = "inference"
FORWARD = "forward"
DX = "forward + dX"
FULL = "forward + full backward"
UNFROZEN = "grad([x]) unfrozen"
PGD = "graphed PGD step"


def inference(build: Build, problem: Problem) -> Callable[[], Any]:
    """Forward, and nothing is kept."""
    layer = build(problem)

    def run() -> Tensor:
        with torch.no_grad():
            return layer()

    return run


def forward(build: Build, problem: Problem) -> Callable[[], Any]:
    """Forward, and what training needs is kept."""
    return build(problem)


def forward_dx(build: Build, problem: Problem) -> Callable[[], Any]:
    """Forward and the gradients of x and gates; weights are frozen."""
    return with_gradients(build, problem.frozen(), ("x", "gates"))


def forward_full(build: Build, problem: Problem) -> Callable[[], Any]:
    """Forward and all gradients, as in training."""
    return with_gradients(build, problem, tuple(problem.leaves))


def unfrozen(build: Build, problem: Problem) -> Callable[[], Any]:
    """Forward and the gradients of x and gates while the weights require grad, as in the inner loop
    of adversarial training."""
    return with_gradients(build, problem, ("x", "gates"))


def graphed_pgd_step(build: Build, problem: Problem) -> Callable[[], Any]:
    """Forward, gradients of x and gates, and the next tokens by ``linf_step``, as the replay of one
    graph. CUDA only.

    Each replay starts where the last one ended; the ball around the first x keeps the tokens in
    range.
    """
    frozen = problem.frozen()
    image = problem.x.detach().clone().requires_grad_()
    point = problem.x.detach().to(torch.float32, copy=True)
    low, high = point - USUAL_EPS, point + USUAL_EPS
    alpha = torch.full((len(point),), USUAL_EPS / 4, device=point.device)
    gradients = with_gradients(build, frozen._replace(x=image), ("x", "gates"))

    def step() -> None:
        gradient, _ = gradients()
        moved, moved_image = linf_step(point, gradient, low, high, alpha, image_dtype=image.dtype)
        with torch.no_grad():
            point.copy_(moved)
            image.copy_(moved_image)

    return captured(step)


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """``step`` as a CUDA graph; a call replays it. CUDA only.

    A kernel's first launch compiles and allocates, which a capture does not allow; so it runs three
    times before, off the main stream.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    return graph.replay


def with_gradients(
    build: Build, problem: Problem, wanted: tuple[str, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and the gradients of these leaves of the problem, as ``Problem.leaves`` names
    them."""
    layer = build(problem)
    leaves = [problem.leaves[name] for name in wanted]

    def run() -> tuple[Tensor, ...]:
        # A dense layer has no use for gates.
        return torch.autograd.grad(layer(), leaves, problem.dy, allow_unused=True)

    return run


PASSES: dict[str, Callable[[Build, Problem], Callable[[], Any]]] = {
    INFERENCE: inference,
    FORWARD: forward,
    DX: forward_dx,
    FULL: forward_full,
    UNFROZEN: unfrozen,
    PGD: graphed_pgd_step,
}


def saved_bytes(build: Build, problem: Problem) -> int:
    """Bytes that autograd keeps after a forward pass: of distinct storages, without those of the
    parameters."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = build(problem)()  # held, so that no storage is freed and counted twice

    for parameter in problem.parameters.values():
        storages.pop(parameter.untyped_storage().data_ptr(), None)

    del y
    return sum(storages.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one call allocates at its peak, beyond what was there before; None on CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
