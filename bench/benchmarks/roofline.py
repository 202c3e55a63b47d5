"""How fast each shape can be at most: FLOPs and bytes of every kernel, against what a GPU does of
either.

Bytes are those of the design, not of the mathematics: each kernel reads its operands and writes its
results once, a gathered row counts each time it is gathered (in the order of experts it is no
longer in cache), and the weights of experts without rows are not read. So a design that moves too
much shows here before it runs.
"""

from typing import NamedTuple

import torch

from ironmoe.bench.benchmarks.gpus import H100, H100_REACHED, Rates
from ironmoe.bench.benchmarks.passes import DX, FORWARD, FULL, INFERENCE, PGD, UNFROZEN
from ironmoe.bench.benchmarks.shapes import Shape
from ironmoe.kernels.tuning import Chip, blocks_for, rows_per_tile

INT = 4  # bytes of an index
FLOAT = 4  # bytes of a gate, a logit or a partial sum
BFLOAT16 = 2  # bytes
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
        return self.ms_at(*H100_REACHED)

    def ms_at(self, tflops: float, terabytes: float) -> float:
        """Milliseconds at least, at so many TFLOP/s and TB/s."""
        return max(self.flops / tflops, self.bytes / terabytes) * 1e-9

    def bound_at(self, tflops: float, terabytes: float) -> str:
        """Which of the two takes longer: "FLOPs" or "bytes"."""
        return "FLOPs" if self.flops / tflops > self.bytes / terabytes else "bytes"


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


def layer_work(shape: Shape, pass_name: str, chip: Chip = H100.chip) -> list[Work]:
    """The kernels of ``expert_mlp`` in one pass, in the order they run, in bf16.

    chip: whose block sizes say how many partial sums a gate's gradient has.
    """
    works = _forward_work(shape, keeps_hidden=pass_name != INFERENCE)
    if pass_name in BACKWARD:
        works += _input_gradient_work(shape, chip, full=pass_name == FULL)
    if pass_name == FULL:
        works += _weight_gradient_work(shape)
    if pass_name == PGD:
        copied = 2 * shape.tokens * shape.dim * (FLOAT + BFLOAT16)
        works += [linf_step_work(shape), Work("copy back", 0, copied)]
    return works


def bound_of(works: list[Work], rates: Rates) -> str:
    """What bounds kernels that run one after another for most of their time: "FLOPs" or "bytes"."""
    ms = dict.fromkeys(("bytes", "FLOPs"), 0.0)
    for work in works:
        ms[work.bound_at(*rates)] += work.ms_at(*rates)
    return max(ms, key=ms.__getitem__)


class _Bytes:
    """Bytes of the tensors of a layer in bf16.

    rows: (R, D), sorted; gathered: the same rows, gathered from x by an index; hidden (R, 2F | F)
    and units (R, F); w_in, w_out: the weights of experts that have rows; every_w_in, every_w_out:
    those of all experts.
    """

    def __init__(self, shape: Shape) -> None:
        used = min(shape.num_experts, shape.rows)
        self.rows = shape.rows * shape.dim * BFLOAT16
        self.gathered = self.rows + shape.rows * INT
        self.hidden = shape.rows * shape.wide * BFLOAT16
        self.units = shape.rows * shape.hidden * BFLOAT16

        w_in = shape.wide * shape.dim * BFLOAT16
        w_out = shape.dim * shape.hidden * BFLOAT16
        self.w_in, self.w_out = used * w_in, used * w_out
        self.every_w_in, self.every_w_out = shape.num_experts * w_in, shape.num_experts * w_out


def _up_flops(shape: Shape) -> int:
    return 2 * shape.rows * shape.dim * shape.wide


def _down_flops(shape: Shape) -> int:
    return 2 * shape.rows * shape.dim * shape.hidden


def _forward_work(shape: Shape, *, keeps_hidden: bool) -> list[Work]:
    size = _Bytes(shape)
    kept = size.hidden if keeps_hidden else 0
    return [
        dispatch_work(shape),
        Work("up product", _up_flops(shape), size.gathered + size.w_in + kept + size.units),
        Work("down product", _down_flops(shape), size.units + size.w_out + size.rows),
        combine_work(shape),
    ]


def _input_gradient_work(shape: Shape, chip: Chip, *, full: bool) -> list[Work]:
    """full: whether weight gradients follow, for which the units are written again."""
    size = _Bytes(shape)
    rows = rows_per_tile(shape.rows, shape.num_experts, torch.bfloat16)
    blocks = blocks_for("hidden_gradient", torch.bfloat16, rows, chip)
    partial = -(-shape.hidden // blocks.n) * shape.rows * FLOAT  # sums of the gate gradient
    units = size.units if full else 0
    hidden_gradient = size.gathered + size.w_out + 2 * size.hidden + partial + units
    return [
        Work("hidden gradient", _down_flops(shape), hidden_gradient),
        Work("gate gradient", 0, partial + shape.rows * (INT + FLOAT)),
        Work("input gradient", _up_flops(shape), size.hidden + size.w_in + size.rows),
        combine_work(shape, gated=False),
    ]


def _weight_gradient_work(shape: Shape) -> list[Work]:
    """The weights of all experts count: an expert without rows gets zeros."""
    size = _Bytes(shape)
    w_in = size.gathered + size.hidden + size.every_w_in
    w_out = size.gathered + size.units + size.every_w_out
    works = [
        Work("weight gradient in", _up_flops(shape), w_in),
        Work("weight gradient out", _down_flops(shape), w_out),
    ]
    if shape.bias:
        biases = shape.num_experts * (shape.wide + shape.dim) * BFLOAT16
        works.append(Work("bias gradients", 0, size.hidden + size.gathered + biases))
    return works


def limit_ms(
    shape: Shape, pass_name: str, rates: Rates = H100_REACHED, chip: Chip = H100.chip
) -> float:
    """Milliseconds of one pass of ``expert_mlp`` at least: one kernel after another, each at its
    own limit."""
    return sum(work.ms_at(*rates) for work in layer_work(shape, pass_name, chip))


def limit_tflops(
    shape: Shape, pass_name: str, rates: Rates = H100_REACHED, chip: Chip = H100.chip
) -> float:
    """TFLOP/s of the needed FLOPs at the limit."""
    return needed_flops(shape, pass_name) / limit_ms(shape, pass_name, rates, chip) * 1e-9


def moving_share(
    shape: Shape, pass_name: str, rates: Rates = H100_REACHED, chip: Chip = H100.chip
) -> float:
    """The time of top-k, dispatch and combine as a share of the whole layer with its top-k, at the
    limit."""
    works = [topk_work(shape), *layer_work(shape, pass_name, chip)]
    moving = sum(work.ms_at(*rates) for work in works if work.kernel in MOVES_ROWS)
    return moving / sum(work.ms_at(*rates) for work in works)
