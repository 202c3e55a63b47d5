"""Try the neighbours of each product's blocks on real shapes and propose rows for the table in ``kernels/tuning.py``.

One change at a time, all timed in turns with the present row; a candidate must compute what the present row computes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.bench.peers import TOLERANCE, worst_row_error
from ironmoe.bench.shapes import MAIN, SHAPES, Shape, make_problem
from ironmoe.bench.timing import OutOfTime, interleaved, time_limit
from ironmoe.kernels import plan_dispatch, tuning
from ironmoe.kernels.dispatch import plan_tiles
from ironmoe.kernels.expert_down import expert_down_backward_op
from ironmoe.kernels.grouped_matmul import grouped_matmul_backward_op, grouped_matmul_op
from ironmoe.kernels.tuning import Blocks, Chip, blocks_for, chip_of

TABLES = ("WIDE", "BLACKWELL", "WITHOUT_TMA", "FLOAT32")
WORTH_IT = 0.99  # of the present time, at most
CANDIDATE_SECONDS = 20.0
RESERVE = 5.0  # seconds that timing may take after the last candidate was compiled
PRESENT = "present"
INTERLEAVED = "clamped_swiglu_interleaved"
ACTIVATION_OF = {
    "activated": "gelu",
    "interleaved": INTERLEAVED,
    "hidden_gradient_interleaved": INTERLEAVED,
}  # else the shape's own


class Proposal(NamedTuple):
    """What was found for one product: ``blocks`` is the present row where nothing was faster. Times in ms."""

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
        gain = f"{self.ms:.3f} ms, was {self.present_ms:.3f}" if self.blocks != self.present else f"{self.ms:.3f} ms, unchanged"
        return f'"{self.product}": {self.blocks},  # {self.table}, {self.shape}: {gain}'


def tune(dtype: torch.dtype, device: torch.device, left: Callable[[], float], shape: Shape = MAIN) -> Iterator[Proposal]:
    """A proposal for each product on ``shape`` (for ungated units on a V-MoE layer, for interleaved ones on gpt-oss's) while
    ``left()`` seconds are > 0.

    Raises:
        OutOfTime: in the middle of a product.
    """
    for product in ("gated", "hidden_gradient", "plain", "weight_gradient", *ACTIVATION_OF):
        if left() > 0:
            yield _tune_product(product, _shape_for(product, shape), dtype, device, left)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _shape_for(product: str, shape: Shape) -> Shape:
    """``shape``, or one whose activation makes the product run."""
    activation = ACTIVATION_OF.get(product, shape.activation)
    if shape is MAIN and product in ACTIVATION_OF:
        return next(s for s in SHAPES if s.activation == activation)
    return shape._replace(activation=activation)


def neighbours(blocks: Blocks, product: str) -> list[Blocks]:
    """All that differ in one field by one step. ``m`` is fixed but for the weight gradient: the tiles are cut before."""
    changes: dict[str, tuple[int, ...]] = {
        "n": tuple(n for n in (blocks.n // 2, blocks.n * 2) if 32 <= n <= 256),
        "k": tuple(k for k in (blocks.k // 2, blocks.k * 2) if 32 <= k <= 128),
        "warps": (4,) if blocks.warps == 8 else (8,),
        "stages": tuple(s for s in (blocks.stages - 1, blocks.stages + 1) if 2 <= s <= 5),
    }
    if product == "weight_gradient":
        changes["m"] = tuple(m for m in (blocks.m // 2, blocks.m * 2) if 32 <= m <= 256)
    else:
        changes["group"] = tuple(g for g in (blocks.group // 2, blocks.group * 2) if 1 <= g <= 32)
        changes["split"] = tuple(s for s in (blocks.split // 2, blocks.split * 2) if 1 <= s <= 8)
        changes["persistent"] = (not blocks.persistent,)
    return [Blocks(**{**blocks._asdict(), field: value}) for field, values in changes.items() for value in values]


@contextmanager
def patched(table: str, product: str, blocks: Blocks) -> Iterator[None]:
    """The table with another row for a while."""
    rows: dict[str, Blocks] = getattr(tuning, table)
    before = rows[product]
    rows[product] = blocks
    try:
        yield
    finally:
        rows[product] = before


def table_of(product: str, dtype: torch.dtype, rows: int, chip: Chip) -> str:
    """Which table the product's blocks come from here: the one whose change changes them."""
    for table in TABLES:
        with patched(table, product, Blocks(16, 16, 16, warps=2)):
            if blocks_for(product, dtype, rows, chip).warps == 2:
                return table
    raise LookupError(f"no table of {TABLES} has the blocks of {product} in {dtype} on {chip.name}")


def _tune_product(product: str, shape: Shape, dtype: torch.dtype, device: torch.device, left: Callable[[], float]) -> Proposal:
    run, chip, rows = _work(product, shape, dtype, device)
    table = table_of(product, dtype, rows, chip)
    present: Blocks = getattr(tuning, table)[product]
    with time_limit(left()):
        expected = run()
    ready: dict[str, Blocks] = {PRESENT: present}
    refused: dict[str, str] = {}
    seen = {blocks_for(product, dtype, rows, chip)}
    for candidate in neighbours(present, product):
        with patched(table, product, candidate):
            effective = blocks_for(product, dtype, rows, chip)  # fewer stages where shared memory is short
            if effective in seen:
                continue
            seen.add(effective)
            try:
                with time_limit(min(CANDIDATE_SECONDS, left())):
                    found = run()
                if all(worst_row_error([a], [b.double()]) <= TOLERANCE[dtype] for a, b in zip(found, expected, strict=True)):
                    ready[str(candidate)] = candidate
                else:
                    refused[str(candidate)] = "computes something else"
            except OutOfTime:
                refused[str(candidate)] = "no time"
            except Exception as error:  # too many registers, too much shared memory: the compiler's answer
                refused[str(candidate)] = f"{type(error).__name__}: {error}"[:200]

    def timed(blocks: Blocks) -> Callable[[], Any]:
        def once() -> Any:
            with patched(table, product, blocks):
                return run()

        return once

    with time_limit(left() + RESERVE):
        times = {name: t.ms for name, t in interleaved({name: timed(b) for name, b in ready.items()}, device).items()}
    best = min(times, key=lambda name: times[name])
    if times[best] > WORTH_IT * times[PRESENT]:
        best = PRESENT
    return Proposal(product, table, shape.name, present, times[PRESENT], ready[best], times[best], times, refused)


def _work(product: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], list[Tensor]], Chip, int]:
    """(what launches the product and little else, the chip, the rows of a tile)."""
    p = make_problem(shape, "uniform", dtype, device)
    x, w_in, w_out, gates = (t.detach() for t in (p.x, p.w_in, p.w_out, p.gates))
    dispatch = plan_dispatch(p.experts, shape.num_experts)
    offsets, row_token, row_slot, slot_row = dispatch
    tiles = plan_tiles(offsets, shape.rows, dtype)
    hidden = torch.randn(shape.rows, shape.wide, device=device, dtype=dtype)
    activated = torch.randn(shape.rows, shape.hidden, device=device, dtype=dtype)
    activation = shape.activation

    def up() -> list[Tensor]:
        return list(grouped_matmul_op(x, w_in, None, offsets, tiles, row_token, slot_row, activation, True, "ieee"))

    def plain() -> list[Tensor]:
        """The two products without an epilogue: the second layer, and the input gradient, whose weights lie the other way."""
        out, _ = grouped_matmul_op(activated, w_out, None, offsets, tiles, None, None, "none", True, "ieee")
        d_rows, _, _ = grouped_matmul_backward_op(
            hidden, None, w_in, offsets, tiles, None, None, "ieee", True, False, False
        )  # fmt: skip
        return [out, d_rows]

    def hidden_gradient() -> list[Tensor]:
        d_gates, _, _, dh = expert_down_backward_op(
            p.dy, gates, w_out, None, hidden, offsets, tiles, row_token, row_slot, slot_row, activation, "ieee",
            True, False, False, True,
        )  # fmt: skip
        return [d_gates, dh]

    def weight_gradient() -> list[Tensor]:
        _, dw, _ = grouped_matmul_backward_op(
            hidden, x, w_in, offsets, tiles, row_token, slot_row, "ieee", False, True, False
        )  # fmt: skip
        return [dw]

    works = {
        "gated": up,
        "activated": up,
        "plain": plain,
        "interleaved": up,
        "hidden_gradient": hidden_gradient,
        "hidden_gradient_interleaved": hidden_gradient,
        "weight_gradient": weight_gradient,
    }
    return works[product], chip_of(x), tuning.rows_per_tile(shape.rows, shape.num_experts, dtype)
