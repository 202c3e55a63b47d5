"""Layers with expert parallelism that really run, in processes on this machine that know each other
through gloo: what they send is counted beside what the cost model says.

Bytes do not depend on the machine. Times do, and none is taken here.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ironmoe.bench.benchmarks.passes import DX, FULL, INFERENCE
from ironmoe.bench.benchmarks.scale.exchange import bytes_between, counts_bytes, exchanges
from ironmoe.bench.benchmarks.scale.forked import in_fresh_process, on_each_rank
from ironmoe.moe import MoE
from ironmoe.moe.distributed import counted_traffic, parallelize

WORLDS = (2, 4)


class Case(NamedTuple):
    """tokens: of each rank, which follow each other as long as there are ranks; bound:
    ``max_tokens_per_rank``."""

    name: str
    options: dict[str, Any]
    tokens: tuple[int, ...]
    dtype: torch.dtype
    bound: int | None = None


_GATED = {"activation": "swiglu", "bias": False, "shared_dim": 12}
CASES = (
    Case("GELU, biases", {"num_experts": 4, "top_k": 2}, (24, 17, 9, 30), torch.float64),
    Case("gated, shared", {"num_experts": 8, "top_k": 3, **_GATED}, (20,) * 4, torch.bfloat16),
    Case("no token on rank 0", {"num_experts": 4, "top_k": 1}, (0, 13, 5, 1), torch.float32),
    Case("bounded", {"num_experts": 8, "top_k": 2}, (12, 16, 8, 4), torch.float32, bound=32),
)
DIM, HIDDEN = 16, 24


def counted_rows() -> list[dict[str, Any]]:
    """A row for each number of processes, case, pass and rank.

    Keys: "ranks", "case", "pass", "rank", and of each of "rows", "counts" (bytes to other ranks),
    "sums" (bytes) and "exchanges" a dict with "counted" and "computed"; "equal": whether they all
    are.

    Raises:
        UserError: a process failed, or did not come to its end.
    """
    rows: list[dict[str, Any]] = in_fresh_process(__name__, "--check")
    return rows


def _rows_of_worlds() -> list[dict[str, Any]]:
    """What all processes count. This one must have no threads yet."""
    return [row for size in WORLDS for rows in on_each_rank(_rows_on, size) for row in rows]


def _rows_on(rank: int, size: int, mesh: Any) -> list[dict[str, Any]]:
    """What one process counts."""
    return [row for case in CASES for row in _rows_of(case, rank, size, mesh)]


def _rows_of(case: Case, rank: int, size: int, mesh: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    layer = MoE(DIM, HIDDEN, dtype=case.dtype, **case.options).eval()
    parallelize(layer, mesh, max_tokens_per_rank=case.bound)
    torch.manual_seed(1 + rank)
    x_TD = torch.randn(case.tokens[rank], DIM, dtype=case.dtype)
    rows_to, rows_from = _rows_between(layer, x_TD, case, rank, size)

    rows = []
    for pass_name, run in RUNS.items():
        with counted_traffic() as traffic:
            run(layer, x_TD)
        computed = {
            "rows": bytes_between(
                rows_to, rows_from, DIM * x_TD.element_size(), pass_name, rank=rank
            ),
            "counts": counts_bytes(layer.num_experts, size),
            "sums": 0,
            "exchanges": exchanges(pass_name),
        }
        numbers = {
            name: {"counted": getattr(traffic, name), "computed": value}
            for name, value in computed.items()
        }
        rows.append(
            {
                "ranks": size,
                "case": case.name,
                "pass": pass_name,
                "rank": rank,
                **numbers,
                "equal": all(both["counted"] == both["computed"] for both in numbers.values()),
            }
        )
    return rows


def _rows_between(
    layer: MoE, x_TD: Tensor, case: Case, rank: int, size: int
) -> tuple[list[int], list[int]]:
    """How many rows this rank sends to each, and gets from each, by what the router chooses."""
    if case.bound is not None:
        return [case.bound] * size, [case.bound] * size
    with torch.no_grad():
        experts_TK = layer.router(x_TD).routing.experts.long()
    rank_R = experts_TK.flatten().div(layer.num_experts // size, rounding_mode="floor")
    rows_to = rank_R.bincount(minlength=size)
    every = [torch.empty_like(rows_to) for _ in range(size)]
    dist.all_gather(every, rows_to)
    return rows_to.tolist(), [int(other[rank]) for other in every]


def _inference(layer: MoE, x_TD: Tensor) -> None:
    with torch.no_grad():
        layer(x_TD)


def _input_gradient(layer: MoE, x_TD: Tensor) -> None:
    """The weights require gradients, and nobody asks for these."""
    x_TD = x_TD.clone().requires_grad_()
    torch.autograd.grad(layer(x_TD).square().sum(), [x_TD])


def _full(layer: MoE, x_TD: Tensor) -> None:
    layer(x_TD.clone().requires_grad_()).square().sum().backward()


RUNS: dict[str, Callable[[MoE, Tensor], None]] = {
    INFERENCE: _inference,
    DX: _input_gradient,
    FULL: _full,
}


if __name__ == "__main__":
    print(json.dumps(_rows_of_worlds()))
