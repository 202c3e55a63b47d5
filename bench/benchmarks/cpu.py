"""``ironmoe bench cpu``: the MoE layer beside Hugging Face's Mixtral experts, on equal weights, in
one run."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ironmoe.bench.common.run_folder import write_atomically
from ironmoe.bench.common.versions import describe_device, versions
from ironmoe.kernels import Routing, expert_mlp, topk_route

# T, d, n, E, K: tokens, width, hidden width, experts, choices
SHAPES = ((1576, 384, 1536, 32, 2), (1024, 768, 3072, 8, 2))
DTYPES = (torch.float32, torch.bfloat16)
PEERS = ("eager", "grouped_mm")
ALLOWED_ERROR = 2.0  # times the larger error of the peers against float64

Timed = Callable[[], Any]


def run_bench_cpu(runs: int, out: Path | None, console: Console) -> list[dict[str, Any]]:
    """Print the table, write the rows to ``out`` if given, return them."""
    torch.manual_seed(0)
    results = []
    for shape in SHAPES:
        for dtype in DTYPES:
            results += _bench_shape(shape, dtype, runs, console)
    console.print(_table(results))
    device = torch.device("cpu")
    console.print(
        f"{describe_device(device)}, torch {torch.__version__}, transformers "
        f"{versions()['transformers']}; median of {runs} interleaved runs. "
        "'dense' is two matrix products of the same FLOPs with one weight each, into buffers that "
        "are there already: the limit. "
        "Inputs, routing and weights are the same for all; a row appears only if the outputs "
        "agree.",
        highlight=False,
    )
    if out is not None:
        write_atomically(
            out,
            json.dumps(
                {"versions": versions(), "device": describe_device(device), "rows": results},
                indent=1,
            ),
        )
    return results


def _bench_shape(
    shape: tuple[int, ...], dtype: torch.dtype, runs: int, console: Console
) -> list[dict[str, Any]]:
    tokens, dim, hidden, num_experts, top_k = shape
    experts = _mixtral_experts(dim, hidden, num_experts, top_k, dtype)
    x = torch.randn(tokens, dim).to(dtype).requires_grad_()
    routing = topk_route(torch.randn(tokens, num_experts), top_k, renormalize=True)

    def ours(x: Tensor) -> Tensor:
        return expert_mlp(x, experts.gate_up_proj, experts.down_proj, routing, activation="swiglu")

    def peer(implementation: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            experts.config._experts_implementation = implementation
            return experts(x, routing.experts.long(), routing.gates)

        return forward

    layers = {"ironmoe": ours, **{name: peer(name) for name in PEERS}}
    errors = _errors(layers, x, experts, routing)
    results = []
    for name, timed in (
        ("forward", {k: _forward_only(f, x) for k, f in layers.items()}),
        ("forward + dX", {k: _forward_and_dx(f, x) for k, f in layers.items()}),
    ):
        timed["dense"] = _dense(tokens * top_k, dim, hidden, dtype, backward=name != "forward")
        times = _interleaved(
            timed, runs, f"{shape} {str(dtype).removeprefix('torch.')} {name}", console
        )
        results.append({
            "shape": shape, "dtype": str(dtype).removeprefix("torch."), "pass": name,
            "milliseconds": {k: median(v) for k, v in times.items()},
            "fastest": {k: min(v) for k, v in times.items()},
            "error": errors[name], "runs": runs,
        })  # fmt: skip
    return results


def _mixtral_experts(
    dim: int, hidden: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> Any:
    """Hugging Face's module with frozen weights, as under attack."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    experts = MixtralExperts(config)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return experts.to(dtype).requires_grad_(False)


def _errors(
    layers: dict[str, Callable[[Tensor], Tensor]], x: Tensor, experts: Any, routing: Routing
) -> dict[str, dict[str, float]]:
    """Largest error of each layer against float64; RuntimeError if ours exceeds twice that of the
    peers (no timing then)."""
    wide = Routing(routing.gates.double(), routing.experts)

    def exact(x: Tensor) -> Tensor:
        return expert_mlp(
            x, experts.gate_up_proj.double(), experts.down_proj.double(), wide, activation="swiglu"
        )

    x64 = x.detach().double().requires_grad_()
    reference = {"forward": exact(x64).detach(), "forward + dX": _forward_and_dx(exact, x64)()}
    errors: dict[str, dict[str, float]] = {}
    for name, expected in reference.items():
        run = _forward_only if name == "forward" else _forward_and_dx
        errors[name] = {
            k: (run(f, x)().double() - expected).abs().max().item() for k, f in layers.items()
        }
        allowed = ALLOWED_ERROR * max(errors[name][peer] for peer in PEERS)
        if errors[name]["ironmoe"] > allowed:
            raise RuntimeError(
                f"outputs disagree in {name}: error {errors[name]['ironmoe']:.3g}, allowed "
                f"{allowed:.3g}; nothing was timed"
            )
    return errors


def _forward_only(layer: Callable[[Tensor], Tensor], x: Tensor) -> Timed:
    def run() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return run


def _forward_and_dx(layer: Callable[[Tensor], Tensor], x: Tensor) -> Timed:
    def run() -> Tensor:
        y = layer(x)
        return torch.autograd.grad(y, [x], torch.ones_like(y))[0]

    return run


def _dense(rows: int, dim: int, hidden: int, dtype: torch.dtype, backward: bool) -> Timed:
    """The matrix products alone, all rows through one pair of weights."""
    x, h, a = (torch.randn(rows, n).to(dtype) for n in (dim, 2 * hidden, hidden))
    w_in, w_out = torch.randn(2 * hidden, dim).to(dtype), torch.randn(dim, hidden).to(dtype)
    to_x, to_h, to_a = torch.empty_like(x), torch.empty_like(h), torch.empty_like(a)

    def run() -> None:
        torch.mm(x, w_in.t(), out=to_h)
        torch.mm(a, w_out.t(), out=to_x)
        if backward:
            torch.mm(x, w_out, out=to_a)
            torch.mm(h, w_in, out=to_x)

    return run


def _interleaved(
    timed: dict[str, Timed], runs: int, label: str, console: Console
) -> dict[str, list[float]]:
    """Milliseconds of each, A B C, B A C, … in a new random order each time: a drifting machine
    drifts for all, and nobody always finds the caches and the heap that the same other one left."""
    for run in timed.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in track(range(runs), description=label, console=console, transient=True):
        for name in random.sample(list(timed), len(timed)):
            start = time.perf_counter()
            timed[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="MoE on CPU, milliseconds (T, d, n, E, K)", title_justify="left")
    for column in ("shape", "dtype", "pass"):
        table.add_column(column)
    for column in (
        "ironmoe",
        *(f"HF {peer}" for peer in PEERS),
        "dense",
        "best HF / ironmoe",
        "ironmoe / dense",
    ):
        table.add_column(column, justify="right")
    for row in results:
        ms = row["milliseconds"]
        peer = min(ms[name] for name in PEERS)
        table.add_row(
            str(row["shape"]),
            row["dtype"],
            row["pass"],
            *(f"{ms[name]:.1f}" for name in ("ironmoe", *PEERS, "dense")),
            f"{peer / ms['ironmoe']:.2f}×",
            f"{ms['ironmoe'] / ms['dense']:.2f}×",
        )
    return table
