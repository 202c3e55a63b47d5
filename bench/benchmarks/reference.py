"""Check that all implementations compute the same layer, before anything is timed."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ironmoe.bench.benchmarks.passes import Build
from ironmoe.bench.benchmarks.shapes import Problem
from ironmoe.kernels.activations import get_activation

SAMPLE = 256  # tokens whose results are compared
# error of the worst row, relative to the row
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Reference(NamedTuple):
    """The layer by its definition on some tokens, in float64.

    tokens: which; dy: a gradient from above that is 0 for every other token; expected: y and all
    gradients by name, for y, x and gates one matrix of the tokens, for a parameter one tensor an
    expert.
    """

    tokens: Tensor
    dy: Tensor
    expected: dict[str, list[Tensor]]


def reference(problem: Problem, sample: int = SAMPLE) -> Reference:
    """Compute the layer expert by expert in plain torch operations. Only the activation comes from
    ironmoe.

    sample: how many tokens.
    """
    p = problem
    tokens = torch.randperm(p.shape.tokens, device=p.x.device)[:sample].sort().values
    dy = torch.zeros_like(p.dy).index_copy(0, tokens, p.dy[tokens])
    own = {
        name: [part.double().requires_grad_() for part in leaf.detach()]
        for name, leaf in p.parameters.items()
    }
    x, gates = (leaf.detach()[tokens].double().requires_grad_() for leaf in (p.x, p.gates))
    activation, experts = get_activation(p.shape.activation), p.experts[tokens]
    y = torch.zeros_like(x)

    for expert in range(p.shape.num_experts):
        weights = {name: parts[expert] for name, parts in own.items()}
        token, slot = (experts == expert).nonzero(as_tuple=True)
        hidden = F.linear(x[token], weights["w_in"], weights.get("b_in"))
        rows = F.linear(activation.value(hidden), weights["w_out"], weights.get("b_out"))
        y = y.index_add(0, token, gates[token, slot].unsqueeze(1) * rows)

    leaves = {"x": [x], "gates": [gates], **own}
    gradients = iter(
        torch.autograd.grad(
            y, [part for parts in leaves.values() for part in parts], dy[tokens].double()
        )
    )
    return Reference(
        tokens,
        dy,
        {
            "y": [y.detach()],
            **{name: [next(gradients) for _ in parts] for name, parts in leaves.items()},
        },
    )


def errors(build: Build, problem: Problem, correct: Reference) -> dict[str, float]:
    """The largest error of y and of every gradient, by name: see ``worst_row_error``. NaN where a
    gradient is missing.

    The layer is asked three times, as it will be timed: without autograd, with frozen weights, and
    with all gradients.
    """
    with torch.no_grad():
        found = {"y in inference": build(problem)()}
    for suffix, asked in ((" with frozen weights", problem.frozen()), ("", problem)):
        y = build(asked)()
        wanted = {name: leaf for name, leaf in asked.leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad(y, list(wanted.values()), correct.dy, allow_unused=True)
        named = {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}
        found |= {name + suffix: result for name, result in named.items()}
    return {name: _error(name.split(" ")[0], result, correct) for name, result in found.items()}


def _error(name: str, found: Tensor | None, correct: Reference) -> float:
    if found is None:
        return float("nan")
    of_tokens = name in ("y", "x", "gates")
    return worst_row_error(
        [found[correct.tokens]] if of_tokens else list(found), correct.expected[name]
    )


def worst_row_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """max over rows of ‖found − expected‖ / ‖expected‖, where a row shorter than the average one
    counts as average.

    Tensor by tensor, so that no wide copy of all experts is needed. One wrong row shows, however
    many are right; NaN or infinity in ``found`` gives NaN or infinity, another shape NaN.
    """
    if [a.shape for a in found] != [b.shape for b in expected]:
        return float("nan")
    square_norm = torch.stack([b.square().sum() for b in expected]).sum()
    average = (square_norm / sum(b.numel() // b.shape[-1] for b in expected)).sqrt()
    worst = [
        (
            (a.double() - b).norm(dim=-1) / torch.maximum(b.norm(dim=-1), average).clamp_min(1e-300)
        ).max()
        for a, b in zip(found, expected, strict=True)
    ]
    return torch.stack(worst).max().item()


def disagreement(found: dict[str, float], dtype: torch.dtype) -> str | None:
    """Which results are too far from the reference, in words; None if all are near enough."""
    wrong = [
        f"{name} by {error:.2g}" for name, error in found.items() if not error <= TOLERANCE[dtype]
    ]
    return (
        f"disagrees with the reference in {', '.join(wrong)} (allowed {TOLERANCE[dtype]:g})"
        if wrong
        else None
    )
