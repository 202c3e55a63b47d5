"""``ironmoe bench cpu``: the MoE layer beside Hugging Face's Mixtral experts, on equal weights, in
turns."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ironmoe.bench.benchmarks.passes import DX, FORWARD, Build, inference, with_gradients
from ironmoe.bench.benchmarks.peers import IRONMOE, OURS, PEERS
from ironmoe.bench.benchmarks.shapes import Problem, Shape, make_problem
from ironmoe.bench.common.dtypes import dtype_name
from ironmoe.bench.common.files import write_json
from ironmoe.bench.common.machine.hardware import describe_device
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.progress_bars import progress_bars
from ironmoe.bench.common.timing import samples_in_turns
from ironmoe.bench.reports.tables import terminal_table

CPU = torch.device("cpu")
SHAPES = (
    Shape("vmoe-s-like", 1576, 384, 1536, 32, 2),
    Shape("vmoe-b-like", 1024, 768, 3072, 8, 2),
)
DTYPES = (torch.float32, torch.bfloat16)
# Name in the table and in JSON → who it is.
TRANSFORMERS = {
    "eager": PEERS["transformers eager"],
    "grouped_mm": PEERS["transformers grouped_mm"],
}
MATRIX_PRODUCTS = "dense"
ALLOWED_ERROR = 2.0  # times the larger error of the peers against float64

TimedRun = Callable[[], Any]


def run_bench_cpu(runs: int, out: Path | None, console: Console) -> list[dict[str, Any]]:
    """Print the table, write the rows to ``out`` if given, and return them.

    Args:
        runs: how often each is timed.

    Raises:
        RuntimeError: our results are too far from those in float64.
    """
    torch.manual_seed(0)
    rows = [
        row
        for shape in SHAPES
        for dtype in DTYPES
        for row in _bench_shape(shape, dtype, runs, console)
    ]

    console.print(_table(rows))
    console.print(
        f"{describe_device(CPU)}, torch {torch.__version__}, transformers "
        f"{versions()['transformers']}; median of {runs} interleaved runs. "
        "'dense' is two matrix products of the same FLOPs with one weight each, into buffers that "
        "are there already: the limit. "
        "Inputs, routing and weights are the same for all; a row appears only if the outputs "
        "agree.",
        highlight=False,
    )
    if out is not None:
        write_json(out, {"versions": versions(), "device": describe_device(CPU), "rows": rows})
    return rows


def _bench_shape(
    shape: Shape, dtype: torch.dtype, runs: int, console: Console
) -> list[dict[str, Any]]:
    """A row for each pass. Weights do not require grad, as under attack."""
    problem = make_problem(shape, "uniform", dtype, CPU).frozen()
    layers = {OURS: IRONMOE.build, **{name: peer.build for name, peer in TRANSFORMERS.items()}}
    passes = {FORWARD: inference, DX: _forward_and_dx}
    errors = {name: _errors(name, run, layers, problem) for name, run in passes.items()}

    rows = []
    for name, run in passes.items():
        timed: dict[str, TimedRun] = {who: run(build, problem) for who, build in layers.items()}
        timed[MATRIX_PRODUCTS] = _matrix_products(problem, backward=name == DX)
        label = f"{shape.sizes} {dtype_name(dtype)} {name}"
        milliseconds = _milliseconds(timed, runs, label, console)
        rows.append(
            {
                "shape": shape.sizes,
                "dtype": dtype_name(dtype),
                "pass": name,
                "milliseconds": {who: median(taken) for who, taken in milliseconds.items()},
                "fastest": {who: min(taken) for who, taken in milliseconds.items()},
                "error": errors[name],
                "runs": runs,
            }
        )

    return rows


def _forward_and_dx(build: Build, problem: Problem) -> Callable[[], Tensor]:
    """Forward and the gradient of x. The gates require no grad here."""
    run = with_gradients(build, problem._replace(gates=problem.gates.detach()), ("x",))
    return lambda: run()[0]


def _errors(
    name: str,
    run: Callable[[Build, Problem], Callable[[], Any]],
    layers: dict[str, Build],
    problem: Problem,
) -> dict[str, float]:
    """The largest error of each layer against float64.

    Raises:
        RuntimeError: ours exceeds twice that of the peers. Nothing is timed then.
    """
    expected = run(IRONMOE.build, problem.double())()
    errors = {
        who: (run(build, problem)().double() - expected).abs().max().item()
        for who, build in layers.items()
    }

    allowed = ALLOWED_ERROR * max(errors[peer] for peer in TRANSFORMERS)
    if errors[OURS] > allowed:
        raise RuntimeError(
            f"outputs disagree in {name}: error {errors[OURS]:.3g}, allowed {allowed:.3g}; nothing "
            "was timed"
        )

    return errors


def _matrix_products(problem: Problem, *, backward: bool) -> TimedRun:
    """The matrix products alone, all rows through one pair of weights, without routing."""
    shape, dtype = problem.shape, problem.x.dtype
    sizes = (shape.dim, shape.wide, shape.hidden)
    x, hidden, activated = (torch.randn(shape.rows, size).to(dtype) for size in sizes)
    to_x, to_hidden, to_activated = (torch.empty_like(t) for t in (x, hidden, activated))
    w_in, w_out = problem.w_in[0], problem.w_out[0]

    def run() -> None:
        torch.mm(x, w_in.t(), out=to_hidden)
        torch.mm(activated, w_out.t(), out=to_x)
        if backward:
            torch.mm(x, w_out, out=to_activated)
            torch.mm(hidden, w_in, out=to_x)

    return run


def _milliseconds(
    timed: dict[str, TimedRun], runs: int, label: str, console: Console
) -> dict[str, list[float]]:
    """The milliseconds of every run, by name."""
    with progress_bars(console, transient=True) as bars:
        task = bars.add_task(label, total=runs, note="")
        samples = samples_in_turns(timed, CPU, runs, on_round=lambda: bars.advance(task))
    return {who: [sample.ms for sample in found] for who, found in samples.items()}


def _table(rows: list[dict[str, Any]]) -> Table:
    names = ("shape", "dtype", "pass")
    numbers = (
        OURS,
        *(f"HF {peer}" for peer in TRANSFORMERS),
        MATRIX_PRODUCTS,
        f"best HF / {OURS}",
        f"{OURS} / {MATRIX_PRODUCTS}",
    )
    title = "MoE on CPU, milliseconds (T, d, n, E, K)"
    table = terminal_table([*names, *numbers], title=title, names=len(names))

    for row in rows:
        ms = row["milliseconds"]
        peer = min(ms[name] for name in TRANSFORMERS)
        table.add_row(
            str(row["shape"]),
            row["dtype"],
            row["pass"],
            *(f"{ms[name]:.1f}" for name in (OURS, *TRANSFORMERS, MATRIX_PRODUCTS)),
            f"{peer / ms[OURS]:.2f}×",
            f"{ms[OURS] / ms[MATRIX_PRODUCTS]:.2f}×",
        )

    return table
