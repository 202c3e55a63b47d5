"""``ironmoe bench scale --throughput``: one layer in one process and shared out over two, in turns,
on the CPU of this machine.

The exchange goes through gloo here, so this says nothing of a GPU. It says what two processes gain
or lose beside the two threads of one.
"""

import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ironmoe.bench.benchmarks.passes import DX, FULL, INFERENCE
from ironmoe.bench.benchmarks.scale.forked import in_fresh_process, on_each_rank
from ironmoe.bench.benchmarks.scale.gloo import RUNS
from ironmoe.bench.reports.formats import Row, show_rows
from ironmoe.moe import MoE

TOKENS, DIM, HIDDEN, EXPERTS, TOP_K = 2048, 384, 1536, 8, 2
ROUNDS = 15
ALONE, THREADS, SHARED = "1 process", "2 threads", "2 processes"
WAYS = (ALONE, THREADS, SHARED)
LARGEST_ERROR = 1e-4  # float32 sums of 1,536 products, in another order


def run_throughput(console: Console, form: str | None) -> None:
    """Measure and print.

    Raises:
        UserError: a process failed.
    """
    rows = in_fresh_process(__name__, "--throughput")
    show_rows(rows, form, throughput_table, console)
    console.print(
        f"The layer ({TOKENS}, {DIM}, {HIDDEN}, {EXPERTS}, {TOP_K}) in float32. Medians of "
        f"{ROUNDS} rounds in which the three ways take turns. Of the two processes each has half "
        "the tokens and half the experts; their results differ from those of one by "
        f"{max(row['largest error'] for row in rows):.1g} at most.",
        highlight=False,
    )


def throughput_table(rows: Sequence[Row]) -> Table:
    """A row for each pass, a column for each way."""
    table = Table(
        title="Tokens a second on this CPU (measured)",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 0),
    )
    table.add_column("pass")
    for way in WAYS:
        table.add_column(way, justify="right")
    table.add_column("2 processes / 2 threads", justify="right")
    for row in rows:
        ratio = row[SHARED] / row[THREADS]
        table.add_row(row["pass"], *(f"{row[way]:.0f}" for way in WAYS), f"{ratio:.2f}")
    return table


def _rows_on(rank: int, size: int, mesh: Any) -> list[Row]:
    torch.manual_seed(0)
    plain, shared = (MoE(DIM, HIDDEN, EXPERTS, TOP_K).eval() for _ in range(2))
    shared.load_state_dict(plain.state_dict())
    shared.parallelize(mesh)
    x_TD = torch.randn(TOKENS, DIM)
    own_TD = x_TD.chunk(size)[rank]
    with torch.no_grad():
        error = float((shared(own_TD) - plain(x_TD).chunk(size)[rank]).abs().max())
    assert error < LARGEST_ERROR, error

    rows: list[Row] = []
    for pass_name in (INFERENCE, DX, FULL):
        seconds = _in_turns(RUNS[pass_name], plain, shared, x_TD, own_TD)
        rates: dict[str, Any] = {way: TOKENS / median(times) for way, times in seconds.items()}
        rows.append({"pass": pass_name, **rates, "largest error": error})
    return rows


def _in_turns(
    run: Callable[[MoE, Tensor], None], plain: MoE, shared: MoE, x_TD: Tensor, own_TD: Tensor
) -> dict[str, list[float]]:
    """Seconds of each round, from when both processes are ready until both are done."""
    is_first = dist.get_rank() == 0
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(ROUNDS + 2):
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
            if number >= 2:  # the first rounds warm up
                seconds[way].append(spent)
    torch.set_num_threads(1)
    return seconds


if __name__ == "__main__":
    print(json.dumps(on_each_rank(_rows_on, 2)[0]))
