"""One row of ``ironmoe bench cpu``: our layer, Hugging Face's and matrix products take turns on
equal weights. Results are compared before times."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.bench.benchmarks.passes import DX, FORWARD, Build, inference, with_gradients
from ironmoe.bench.benchmarks.peers import IRONMOE, OURS, PEERS
from ironmoe.bench.benchmarks.shapes import Problem, Shape, make_problem
from ironmoe.bench.common.dtypes import dtype_name
from ironmoe.bench.common.timing import MIN_ROUNDS, samples_in_turns

CPU = torch.device("cpu")
# Name in the table and in JSON → who it is.
TRANSFORMERS = {
    "eager": PEERS["transformers eager"],
    "grouped_mm": PEERS["transformers grouped_mm"],
}
MATRIX_PRODUCTS = "dense"
ALLOWED_ERROR = 2.0  # times the larger error of the peers against float64
WARMUP = 1  # calls that are not timed; the comparison of the results was a first one

TimedRun = Callable[[], Any]


def _forward_and_dx(build: Build, problem: Problem) -> Callable[[], Tensor]:
    """Forward and the gradient of x. The gates require no grad here."""
    run = with_gradients(build, problem._replace(gates=problem.gates.detach()), ("x",))
    return lambda: run()[0]


PASSES: dict[str, Callable[[Build, Problem], TimedRun]] = {
    FORWARD: inference,
    DX: _forward_and_dx,
}
LAYERS = {OURS: IRONMOE.build, **{name: peer.build for name, peer in TRANSFORMERS.items()}}


class Contest(NamedTuple):
    """What one row is about. asked: one of PASSES."""

    shape: Shape
    dtype: torch.dtype
    asked: str

    @property
    def key(self) -> dict[str, Any]:
        """What tells its row from others."""
        return {"shape": self.shape.sizes, "dtype": dtype_name(self.dtype), "pass": self.asked}

    @property
    def label(self) -> str:
        return f"{self.shape.name} {dtype_name(self.dtype)} {self.asked}"

    def problem(self) -> Problem:
        """The same numbers whatever was measured before. Weights do not require grad, as under
        attack."""
        torch.manual_seed(0)
        return make_problem(self.shape, "uniform", self.dtype, CPU).frozen()


class Compared(NamedTuple):
    """errors: the largest of each layer against float64; seconds: of one call of each and of the
    products, about."""

    errors: dict[str, float]
    seconds: float

    def rounds(self, runs: int, seconds: float) -> int:
        """How many of ``runs`` fit into the seconds of a row, of which there are three at least."""
        fitting = int(min(runs, seconds / max(self.seconds, 1e-9)))
        return min(runs, max(MIN_ROUNDS, fitting))


def compare_results(contest: Contest) -> Compared:
    """Call each layer once.

    Raises:
        RuntimeError: our error is more than twice that of the peers.
    """
    problem, run = contest.problem(), PASSES[contest.asked]
    expected = run(IRONMOE.build, problem.double())()
    errors, seconds = {}, {}
    for who, build in LAYERS.items():
        layer = run(build, problem)
        start = time.perf_counter()
        result = layer()
        seconds[who] = time.perf_counter() - start
        errors[who] = (result.double() - expected).abs().max().item()

    allowed = ALLOWED_ERROR * max(errors[peer] for peer in TRANSFORMERS)
    if errors[OURS] > allowed:
        raise RuntimeError(
            f"outputs disagree in {contest.asked}: error {errors[OURS]:.3g}, allowed "
            f"{allowed:.3g}; nothing was timed"
        )

    return Compared(errors, sum(seconds.values()) + min(seconds.values()))


def measure(
    contest: Contest,
    compared: Compared,
    runs: int,
    seconds: float,
    on_round: Callable[[], object],
) -> dict[str, Any]:
    """The figures of the row: medians and fastest runs in milliseconds, and how many runs."""
    problem, run = contest.problem(), PASSES[contest.asked]
    timed: dict[str, TimedRun] = {who: run(build, problem) for who, build in LAYERS.items()}
    timed[MATRIX_PRODUCTS] = _matrix_products(problem, backward=contest.asked == DX)
    samples = samples_in_turns(timed, CPU, runs, seconds, warmup=WARMUP, on_round=on_round)

    taken = {who: [sample.ms for sample in found] for who, found in samples.items()}
    return {
        "name": contest.shape.name,
        "milliseconds": {who: median(times) for who, times in taken.items()},
        "fastest": {who: min(times) for who, times in taken.items()},
        "error": compared.errors,
        "runs": len(taken[OURS]),
    }


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
