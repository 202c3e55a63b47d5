"""``ironmoe bench scale --throughput``: one layer in one process and shared out over two, in turns,
on the CPU of this machine.

The exchange goes through gloo here, so this says nothing of a GPU. It says what two processes gain
or lose beside the two threads of one.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ironmoe.bench.benchmarks.passes import DX, FULL, INFERENCE
from ironmoe.bench.benchmarks.scale.forked import in_fresh_process, on_each_rank
from ironmoe.bench.benchmarks.scale.gloo import RUNS
from ironmoe.bench.common.machine.hardware import describe_device
from ironmoe.bench.common.rows.found import are_ascending_times, are_times, is_count
from ironmoe.bench.common.rows.measuring import RowToMeasure, measure_rows
from ironmoe.bench.common.rows.rows_file import Row, rows_file
from ironmoe.bench.reports.formats import show_rows
from ironmoe.bench.reports.tables import terminal_table
from ironmoe.moe import MoE

TOKENS, DIM, HIDDEN, EXPERTS, TOP_K = 2048, 384, 1536, 8, 2
LAYER = ",".join(map(str, (TOKENS, DIM, HIDDEN, EXPERTS, TOP_K)))
PASSES = (INFERENCE, DX, FULL)
ROUNDS, WARMUP = 31, 2
SECONDS = 25.0  # of a row, as long as nothing is known of the machine
ALONE, THREADS, SHARED = "1 process", "2 threads", "2 processes"
WAYS = (ALONE, THREADS, SHARED)
LARGEST_ERROR = 1e-4  # float32 sums of 1,536 products, in another order


def run_throughput(
    console: Console, *, out: Path | None = None, again: bool = False, form: str | None = None
) -> list[Row]:
    """Print each row when it is measured, and all of them at the end; return them.

    Args:
        console: for all but rows in a format.
        out, again: see ``rows_file``.
        form: of the rows on standard output, see ``show_rows``.

    Raises:
        UserError: a process failed, or the file cannot be used.
    """
    asked = [{"layer": LAYER, "pass": name} for name in PASSES]
    settings = {"rounds": ROUNDS}
    with rows_file(
        "bench scale throughput", settings, out=out, asked=asked, again=again, is_whole=_is_whole
    ) as kept:
        console.print(kept.greeting, highlight=False, markup=False, soft_wrap=True)
        missing = [key for key in asked if not kept.find(key)]
        measure_rows([_to_measure(key) for key in missing], kept, console, _words)
        rows = [row for key in asked if (row := kept.find(key)) is not None]

    show_rows(rows, form, throughput_table, console)
    console.print(
        f"The layer ({LAYER}) in float32; {describe_device(torch.device('cpu'))}, torch "
        f"{torch.__version__}. Medians of {ROUNDS} rounds in which the three ways take turns. Of "
        "the two processes each has half the tokens and half the experts; the last column is the "
        "ratio of the rates in one round, with its quartiles. Outputs and input gradients of two "
        f"processes differ from those of one by {max(row['largest_error'] for row in rows):.1g} at "
        "most.",
        highlight=False,
    )
    return rows


def throughput_table(rows: Sequence[Any]) -> Table:
    """A row for each pass, a column for each way."""
    columns = ["pass", *WAYS, "2 processes / 2 threads"]
    table = terminal_table(columns, title="Tokens a second on this CPU (measured)")
    for row in rows:
        table.add_row(row["pass"], *rates_and_ratio(row))
    return table


def rates_and_ratio(row: Row) -> list[str]:
    """The figures of a row as they are printed."""
    low, middle, high = row["ratio"]
    rates = [f"{row['tokens_per_second'][way]:,.0f}" for way in WAYS]
    return [*rates, f"{middle:.2f} ({low:.2f} to {high:.2f})"]


def _to_measure(key: dict[str, str]) -> RowToMeasure:
    def measure(_: Callable[[], object]) -> dict[str, Any]:
        found: dict[str, Any] = in_fresh_process(__name__, "--throughput", key["pass"])
        return found

    return RowToMeasure(key, key["pass"], 1, SECONDS, measure)


def _words(row: Row) -> str:
    rates = row["tokens_per_second"]
    return ", ".join(f"{way} {rates[way]:,.0f}" for way in WAYS) + " tokens a second"


def _is_whole(row: Row) -> bool:
    fastest, middle, rates = (
        row.get(name) for name in ("fastest", "milliseconds", "tokens_per_second")
    )
    if not (isinstance(fastest, dict) and isinstance(middle, dict) and isinstance(rates, dict)):
        return False
    ratio, error = row.get("ratio"), row.get("largest_error")
    return (
        is_count(row.get("rounds"))
        and all(are_ascending_times((fastest.get(w), middle.get(w))) for w in WAYS)
        and are_times(rates.get(way) for way in WAYS)
        and isinstance(ratio, list)
        and len(ratio) == 3
        and are_ascending_times(ratio)
        and isinstance(error, float)
        and 0 <= error < LARGEST_ERROR
    )


def measured(pass_name: str, size: int, mesh: Any) -> dict[str, Any]:
    """The figures of one pass, on each rank of the mesh; those of the first rank count.

    Returns:
        milliseconds, fastest, tokens_per_second: of each way; ratio: the quartiles and the median
        of the rates of two processes divided by those of two threads, round by round;
        largest_error: of outputs and input gradients; rounds.
    """
    rank = dist.get_rank()
    torch.manual_seed(0)
    plain, shared = (MoE(DIM, HIDDEN, EXPERTS, TOP_K).eval() for _ in range(2))
    shared.load_state_dict(plain.state_dict())
    shared.parallelize(mesh)
    x_TD = torch.randn(TOKENS, DIM)
    own_TD = x_TD.chunk(size)[rank]
    largest = _difference(_results(shared, own_TD), _results(plain, x_TD), rank, size)
    assert largest < LARGEST_ERROR, largest

    seconds = _in_turns(RUNS[pass_name], plain, shared, x_TD, own_TD)
    low, middle, high = quantiles(
        (threads / both for threads, both in zip(seconds[THREADS], seconds[SHARED], strict=True)),
        n=4,
        method="inclusive",
    )
    return {
        "milliseconds": {way: 1e3 * median(times) for way, times in seconds.items()},
        "fastest": {way: 1e3 * min(times) for way, times in seconds.items()},
        "tokens_per_second": {way: TOKENS / median(times) for way, times in seconds.items()},
        "ratio": [low, middle, high],
        "largest_error": largest,
        "rounds": ROUNDS,
    }


def _results(layer: MoE, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the sum of its squares."""
    x_TD = x_TD.clone().requires_grad_()
    y_TD = layer(x_TD)
    return y_TD.detach(), torch.autograd.grad(y_TD.square().sum(), x_TD)[0]


def _difference(own: tuple[Tensor, ...], whole: tuple[Tensor, ...], rank: int, size: int) -> float:
    """The largest, relative to the largest number of one process."""
    return max(
        float((mine - all_.chunk(size)[rank]).abs().max() / all_.abs().max())
        for mine, all_ in zip(own, whole, strict=True)
    )


def _in_turns(
    run: Callable[[MoE, Tensor], None],
    plain: MoE,
    shared: MoE,
    x_TD: Tensor,
    own_TD: Tensor,
) -> dict[str, list[float]]:
    """Seconds of each round, from when both processes are ready until both are done."""
    is_first = dist.get_rank() == 0
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(ROUNDS + WARMUP):
        for way in WAYS:
            torch.set_num_threads(2 if way == THREADS else 1)
            dist.barrier()
            start = time.perf_counter()
            if way == SHARED:
                run(shared, own_TD)
                dist.barrier()
            elif is_first:
                run(plain, x_TD)
            spent = time.perf_counter() - start
            dist.barrier()
            if number >= WARMUP:
                seconds[way].append(spent)
    torch.set_num_threads(1)
    return seconds


def _of_argument(rank: int, size: int, mesh: Any) -> dict[str, Any]:
    return measured(sys.argv[1], size, mesh)


if __name__ == "__main__":
    print(json.dumps(on_each_rank(_of_argument, 2)[0]))
