"""Try the neighbours of each product's blocks on real shapes and propose rows for the table in
``kernels/tuning.py``.

All are timed in turns with the present row; a candidate must compute what the present row computes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.bench.benchmarks.block_tables import patched, table_of
from ironmoe.bench.benchmarks.gpu.run_log import Pen
from ironmoe.bench.benchmarks.gpu.tasks.neighbours import neighbours
from ironmoe.bench.benchmarks.gpu.tasks.pool import in_processes
from ironmoe.bench.benchmarks.gpu.tasks.products import work_of
from ironmoe.bench.benchmarks.reference import TOLERANCE, worst_row_error
from ironmoe.bench.benchmarks.shapes import MAIN, SHAPES, Shape
from ironmoe.bench.common.timing import Countdown, OutOfTime, interleaved, time_limit
from ironmoe.kernels import tuning
from ironmoe.kernels.tuning import Blocks, Chip, blocks_for

WORTH_IT = 0.99  # of the present time, at most
CANDIDATE_SECONDS = 20.0
TIMING_SECONDS = 5.0  # that timing may take after the last candidate was compiled
PRESENT = "present"
WORKERS, PARTS = 12, 4  # processes that compile ahead; items that the candidates of a product make
WORKER_BYTES = 8 << 30  # of GPU memory, that each of them may need
AHEAD_SHARE = 0.6  # of the time, at most
INTERLEAVED = "clamped_swiglu_interleaved"
ACTIVATION_OF = {
    "activated": "gelu",
    "interleaved": INTERLEAVED,
    "hidden_gradient_interleaved": INTERLEAVED,
}  # else the shape's own
TUNED = ("gated", "hidden_gradient", "plain", "weight_gradient", *ACTIVATION_OF)


class Proposal(NamedTuple):
    """What was found for one product. Times are in milliseconds.

    blocks: the fastest; the present row where nothing was faster; tried: the time of every
    candidate; refused: why others were not timed.
    """

    product: str
    table: str
    shape: str
    present: Blocks
    present_ms: float
    blocks: Blocks
    ms: float
    tried: dict[str, float]
    refused: dict[str, str]

    @property
    def text(self) -> str:
        """The row as it stands in the table."""
        before = "unchanged" if self.blocks == self.present else f"was {self.present_ms:.3f}"
        reason = f"{self.table}, {self.shape}: {self.ms:.3f} ms, {before}"
        return f'"{self.product}": {self.blocks},  # {reason}'


def tune(
    dtype: torch.dtype,
    device: torch.device,
    left: Callable[[], float],
    pen: Pen,
    shape: Shape = MAIN,
    rounds: int = 20,
) -> bool:
    """Propose a row for each product on ``shape``, while ``left()`` seconds are > 0. Ungated units
    are tried on a V-MoE layer, interleaved ones on gpt-oss's.

    Returns:
        True if there was time for all.
    """
    products = [product for product in TUNED if product not in pen.done]
    if device.type == "cuda":
        _compile_ahead(
            [(product, shape_for(product, shape), dtype) for product in products], device, left
        )

    for i, product in enumerate(products):
        if left() <= 0:
            return False

        countdown = Countdown(left() / (len(products) - i))
        pen.begin(product, "ironmoe")
        try:
            proposal = propose(
                product, shape_for(product, shape), dtype, device, countdown.left, rounds
            )
        except OutOfTime:
            continue

        blocks = {"present": proposal.present._asdict(), "blocks": proposal.blocks._asdict()}
        pen.finish(product, tuning=[proposal._asdict() | blocks | {"text": proposal.text}])
        if device.type == "cuda":
            torch.cuda.empty_cache()

    return all(product in pen.done for product in TUNED)


def _compile_ahead(
    places: list[tuple[str, Shape, torch.dtype]], device: torch.device, left: Callable[[], float]
) -> None:
    """Compile all candidates of all products on all cores. One after the other they would take
    minutes."""
    free, _ = torch.cuda.mem_get_info(device)
    workers = min(WORKERS, (os.cpu_count() or 1) - 1, free // WORKER_BYTES)
    items = [(*place, str(device), part) for part in range(PARTS) for place in places]
    in_processes(compile_part, items, workers, AHEAD_SHARE * left())


def compile_part(item: tuple[str, Shape, torch.dtype, str, int]) -> None:
    """Run every PARTS-th candidate of a product once, in a process of its own."""
    product, shape, dtype, device, part = item
    run, chip, rows = work_of(product, shape, dtype, torch.device(device))
    table = table_of(product, dtype, rows, chip)
    for candidate in neighbours(getattr(tuning, table)[product], product)[part::PARTS]:
        # tuning runs it again and says why it is refused
        with patched(table, product, candidate), suppress(Exception):
            run()


def shape_for(product: str, shape: Shape) -> Shape:
    """``shape``, or a shape whose activation makes the product run."""
    activation = ACTIVATION_OF.get(product, shape.activation)
    if shape is MAIN and product in ACTIVATION_OF:
        return next(s for s in SHAPES if s.activation == activation)
    return shape._replace(activation=activation)


def propose(
    product: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    left: Callable[[], float],
    rounds: int = 20,
) -> Proposal:
    """Time the neighbours of the present blocks in turns with them, and propose the fastest.

    Raises:
        OutOfTime: before anything could be compared.
    """
    run, chip, rows = work_of(product, shape, dtype, device)
    table = table_of(product, dtype, rows, chip)
    present: Blocks = getattr(tuning, table)[product]

    with time_limit(left()):
        expected = run()
    ready: dict[str, Blocks] = {PRESENT: present}
    refused: dict[str, str] = {}
    for candidate in _distinct(neighbours(present, product), product, table, dtype, rows, chip):
        with patched(table, product, candidate):
            why = objection(run, expected, dtype, left)
        if why:
            refused[str(candidate)] = why
        else:
            ready[str(candidate)] = candidate

    timed = {name: run_under(table, product, blocks, run) for name, blocks in ready.items()}
    with time_limit(left() + TIMING_SECONDS):
        times = {name: timing.ms for name, timing in interleaved(timed, device, rounds).items()}

    fastest = min(times, key=lambda name: times[name])
    best = fastest if times[fastest] <= WORTH_IT * times[PRESENT] else PRESENT
    return Proposal(
        product=product,
        table=table,
        shape=shape.name,
        present=present,
        present_ms=times[PRESENT],
        blocks=ready[best],
        ms=times[best],
        tried=times,
        refused=refused,
    )


def _distinct(
    candidates: list[Blocks], product: str, table: str, dtype: torch.dtype, rows: int, chip: Chip
) -> Iterator[Blocks]:
    """The candidates that change what is launched here. Where shared memory is short, some become
    the same blocks with fewer stages."""
    seen = {blocks_for(product, dtype, rows, chip)}
    for candidate in candidates:
        with patched(table, product, candidate):
            effective = blocks_for(product, dtype, rows, chip)
        if effective not in seen:
            seen.add(effective)
            yield candidate


def objection(
    run: Callable[[], list[Tensor]],
    expected: list[Tensor],
    dtype: torch.dtype,
    left: Callable[[], float],
) -> str:
    """Why the blocks that are in the table now cannot be timed; empty if they can."""
    try:
        with time_limit(min(CANDIDATE_SECONDS, left())):
            found = run()
        agree = all(
            worst_row_error([a], [b.double()]) <= TOLERANCE[dtype]
            for a, b in zip(found, expected, strict=True)
        )
        return "" if agree else "computes something else"
    except OutOfTime:
        return "no time"
    except Exception as error:  # too many registers, too much shared memory: the compiler's answer
        return f"{type(error).__name__}: {error}"[:200]


def run_under(
    table: str, product: str, blocks: Blocks, run: Callable[[], Any]
) -> Callable[[], Any]:
    """``run`` as a function that first puts these blocks into the table."""

    def once() -> Any:
        with patched(table, product, blocks):
            return run()

    return once
