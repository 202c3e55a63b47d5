"""How fast each shape can be at most: FLOPs and bytes of every kernel, against what an H100 does of
either.

Bytes are those of the design, not of the mathematics: each kernel reads its operands and writes its
results once, a gathered row counts each time it is gathered (in the order of experts it is no
longer in cache), and the weights of experts without rows are not read. So a design that moves too
much shows here before it runs.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ironmoe.bench.benchmarks.passes import DX, FORWARD, FULL, INFERENCE, PGD, UNFROZEN
from ironmoe.bench.benchmarks.shapes import Shape
from ironmoe.kernels.tuning import CHIPS, blocks_for, rows_per_tile

if TYPE_CHECKING:
    from rich.console import Console

PEAK_TFLOPS = 790.0  # of a bf16 8192³ product, as measured on an H100
PEAK_TERABYTES = 3.0  # a second, of a copy, as measured on an H100
INT, FLOAT = 4, 4  # bytes of an index, and of a gate, a logit or a partial sum
BACKWARD = (DX, FULL, UNFROZEN, PGD)
MOVES_ROWS = ("topk_route", "plan_dispatch", "combine")


class Work(NamedTuple):
    """What one kernel has to do."""

    kernel: str
    flops: int
    bytes: int

    @property
    def ms(self) -> float:
        """Milliseconds that an H100 needs at least."""
        return self.ms_at(PEAK_TFLOPS, PEAK_TERABYTES)

    def ms_at(self, tflops: float, terabytes: float) -> float:
        """Milliseconds at least, at so many TFLOP/s and TB/s."""
        return max(self.flops / tflops, self.bytes / terabytes) * 1e-9

    @property
    def bound(self) -> str:
        return "FLOPs" if self.flops / PEAK_TFLOPS > self.bytes / PEAK_TERABYTES else "bytes"


def needed_flops(shape: Shape, pass_name: str) -> int:
    """FLOPs of the products that the pass needs, 2·m·n·k each, whoever does it. For ``grad([x])``
    no weight gradient is one of them."""
    forward = 2 * shape.rows * shape.dim * (shape.wide + shape.hidden)
    if pass_name in (INFERENCE, FORWARD):
        return forward
    return forward * (3 if pass_name == FULL else 2)


def topk_work(shape: Shape) -> Work:
    """It reads float32 logits and writes gates and experts."""
    return Work(
        "topk_route", 0, shape.tokens * shape.num_experts * FLOAT + shape.rows * (FLOAT + INT)
    )


def dispatch_work(shape: Shape) -> Work:
    """It reads the choices to count and to place them, and writes row_token, row_slot and
    slot_row."""
    return Work("plan_dispatch", 0, 5 * shape.rows * INT)


def combine_work(shape: Shape, itemsize: int = 2, gated: bool = True) -> Work:
    """It reads R rows, an index and perhaps a gate for each choice, and writes T rows."""
    moved = (shape.rows + shape.tokens) * shape.dim * itemsize
    return Work("combine", 0, moved + shape.rows * (INT + (FLOAT if gated else 0)))


def linf_step_work(shape: Shape, itemsize: int = 2) -> Work:
    """It reads point, low and high in float32 and the gradient, and writes the point, and the image
    where that is not float32 itself."""
    image = itemsize if itemsize < FLOAT else 0
    return Work("linf_step", 0, shape.tokens * shape.dim * (4 * FLOAT + itemsize + image))


def layer_work(shape: Shape, pass_name: str) -> list[Work]:
    """The kernels of ``expert_mlp`` in one pass, in the order they run, in bf16."""
    T, D, F, E, _ = shape.sizes
    R, wide = shape.rows, shape.wide
    b = 2  # bytes of a bfloat16
    used = min(E, R)
    w_in, w_out = used * wide * D * b, used * D * F * b
    gathered = R * D * b + R * INT
    narrow, hidden = R * F * b, R * wide * b
    kept = 0 if pass_name == INFERENCE else hidden
    works = [
        dispatch_work(shape),
        Work("up product", 2 * R * D * wide, gathered + w_in + kept + narrow),
        Work("down product", 2 * R * D * F, narrow + w_out + R * D * b),
        combine_work(shape),
    ]

    if pass_name in BACKWARD:
        full = pass_name == FULL
        blocks = blocks_for(
            "hidden_gradient", torch.bfloat16, rows_per_tile(R, E, torch.bfloat16), CHIPS["sm_90"]
        )
        partial = -(-F // blocks.n) * R * FLOAT
        works += [
            Work(
                "hidden gradient",
                2 * R * D * F,
                gathered + w_out + 2 * hidden + partial + (narrow if full else 0),
            ),
            Work("gate gradient", 0, partial + R * (INT + FLOAT)),
            Work("input gradient", 2 * R * D * wide, hidden + w_in + R * D * b),
            combine_work(shape, gated=False),
        ]
        if full:
            # an expert without rows gets zeros
            every_w_in, every_w_out = E * wide * D * b, E * D * F * b
            works.append(
                Work("weight gradient in", 2 * R * D * wide, gathered + hidden + every_w_in)
            )
            works.append(
                Work("weight gradient out", 2 * R * D * F, gathered + narrow + every_w_out)
            )
        if full and shape.bias:
            works.append(Work("bias gradients", 0, hidden + gathered + E * (wide + D) * b))

    if pass_name == PGD:
        works += [linf_step_work(shape), Work("copy back", 0, 2 * T * D * (FLOAT + b))]
    return works


def limit_ms(shape: Shape, pass_name: str) -> float:
    """Milliseconds of one pass of ``expert_mlp`` at least: one kernel after another, each at its
    own limit."""
    return sum(work.ms for work in layer_work(shape, pass_name))


def limit_tflops(shape: Shape, pass_name: str) -> float:
    """TFLOP/s of the needed FLOPs at the limit."""
    return needed_flops(shape, pass_name) / limit_ms(shape, pass_name) * 1e-9


def moving_share(shape: Shape, pass_name: str) -> float:
    """The time of top-k, dispatch and combine as a share of the whole layer with its top-k, at the
    limit."""
    works = [topk_work(shape), *layer_work(shape, pass_name)]
    return sum(work.ms for work in works if work.kernel in MOVES_ROWS) / sum(
        work.ms for work in works
    )


def print_roofline(shapes: tuple[Shape, ...], console: "Console", *, every_kernel: bool) -> None:
    """Print a line for each shape and pass; with ``every_kernel`` also one for each kernel."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = "Limits of one bf16 layer on an H100, (T, D, F, E, K)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("shape and pass")

    for column in ("TFLOP", "GB", "ms", "TFLOP/s", "moving rows", "bound by"):
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))

    for shape in shapes:
        table.add_row(f"[bold]{shape.name}[/] {shape.sizes}")
        for pass_name in (INFERENCE, FORWARD, DX, FULL, PGD):
            works = layer_work(shape, pass_name)
            table.add_row(
                f"  {pass_name}",
                f"{sum(w.flops for w in works) * 1e-12:.3f}",
                f"{sum(w.bytes for w in works) * 1e-9:.2f}",
                f"{limit_ms(shape, pass_name):.3f}",
                f"{limit_tflops(shape, pass_name):.0f}",
                f"{moving_share(shape, pass_name):.1%}",
            )
            for work in works if every_kernel else ():
                figures = (
                    f"{work.flops * 1e-12:.3f}",
                    f"{work.bytes * 1e-9:.2f}",
                    f"{work.ms:.3f}",
                )
                table.add_row(f"    {work.kernel}", *figures, "", "", work.bound)

    console.print(table)
    console.print(
        f"At {PEAK_TFLOPS:g} TFLOP/s and {PEAK_TERABYTES:g} TB/s, one kernel after another. "
        "Moving rows: top-k, dispatch and combine as "
        "a share of the layer with its top-k.",
        highlight=False,
    )
