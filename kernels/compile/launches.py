"""One launch of every kernel at every configuration of the tuning table, recorded on meta tensors:
no memory, no GPU.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.kernels.activations import ACTIVATIONS, GATED_ACTIVATIONS
from ironmoe.kernels.compile.specialization import specialize
from ironmoe.kernels.gpu import (
    attack_step,
    combine,
    dispatch,
    grouped_matmul,
    hidden_gradient,
    topk,
    weight_gradient,
)
from ironmoe.kernels.gpu.launch import Launch, observe
from ironmoe.kernels.scores import SCORES
from ironmoe.kernels.tuning import Chip, assume
from ironmoe.kernels.types import Dispatch, ExpertGroups, GateRule

E, K = 128, 8  # Qwen3-30B-A3B
SIZES = (2048, 768)  # its D and F: multiples of every block
ODD_SIZES = (2046, 770)  # multiples of none; rows that TMA does not take
GPT_OSS_SIZES = (2880, 2880)  # multiples of some
ROWS = (16, 32, 64, 128)  # an expert's rows, one for each BLOCK_M
# AMD's compiler addresses tensors beyond 2 GB in another way than smaller ones.
ROWS_BEYOND_2_GB, EXPERTS_BEYOND_2_GB = 8192, 1024
LAYOUTS = ("gelu", "swiglu", "clamped_swiglu_interleaved")  # H has one half, two, or two in turns
DTYPES = (torch.bfloat16, torch.float32)  # float16 takes the configurations of bfloat16
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class NamedLaunch(NamedTuple):
    """A launch and what it is, in words."""

    name: str
    dtype: torch.dtype
    launch: Launch


def usual_launches(chip: Chip) -> list[NamedLaunch]:
    """Every kernel as it would be launched on ``chip`` in layers of usual sizes, each configuration
    once.
    """
    return collect(chip, layers())


def collect(chip: Chip, *steps: Iterator[tuple[str, torch.dtype]]) -> list[NamedLaunch]:
    """The launches that some steps make on ``chip``, each that the compiler can tell from the
    others once.

    Args:
        steps: each takes a step when it is asked for the next (name, dtype) and says after it what
        it was.
    """
    found: dict[tuple[object, ...], NamedLaunch] = {}
    with assume(chip), observe() as launches:
        for name, dtype in chain(*steps):
            for launch in launches:
                kernel = str(launch.kernel.__name__).removesuffix("_kernel")
                key = (
                    launch.kernel,
                    specialize(launch, chip).key,
                    launch.num_warps,
                    launch.num_stages,
                )
                found.setdefault(
                    key, NamedLaunch(f"{kernel}: {name}" if name else kernel, dtype, launch)
                )
            launches.clear()
    return list(found.values())


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """A tensor that has no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def layers() -> Iterator[tuple[str, torch.dtype]]:
    """(name, dtype) of each step, after it was taken."""
    for dtype in DTYPES:
        for rows in ROWS if dtype == torch.bfloat16 else ROWS[:2]:
            full = rows == ROWS[-1] and dtype == torch.bfloat16
            for activation in ACTIVATIONS if full else LAYOUTS:
                for step in expert(dtype, rows, activation):
                    yield step, dtype
            if dtype == torch.bfloat16:
                for step in expert(
                    dtype, rows, "clamped_swiglu_interleaved", sizes=GPT_OSS_SIZES, transposed=True
                ):
                    yield f"{step}, gpt-oss", dtype
        dy, rows_RD = meta(64, SIZES[0], dtype=dtype), meta(64 * K, SIZES[0], dtype=dtype)
        combine.combine_backward(
            dy, rows_RD, gates_of(64), *index(64 * K, 64), want_rows=True, want_gates=True
        )
        yield "", dtype
    for activation in LAYOUTS:
        for step in expert(torch.bfloat16, ROWS[-1], activation, sizes=ODD_SIZES):
            yield f"{step}, odd sizes", torch.bfloat16
    for activation in LAYOUTS:
        for sizes, which in ((SIZES, ""), (ODD_SIZES, "odd sizes, ")):
            for step in expert(
                torch.bfloat16, ROWS_BEYOND_2_GB, activation, sizes=sizes, E=EXPERTS_BEYOND_2_GB
            ):
                yield f"{step}, {which}beyond 2 GB", torch.bfloat16
    for step in expert(torch.float32, ROWS[1], "gelu", precision="tf32"):
        yield f"{step}, tf32", torch.float32
    for integer in (torch.int64, torch.int32, torch.int16, torch.uint8):
        dispatch.plan(meta(4096, K, dtype=integer), E, torch.bfloat16)
        yield "", integer
    for score in SCORES:
        for order in ("score_first", "topk_first"):
            _router(E, K, score, order)
            yield f"{score}, {order}", torch.float32
    _router(1024, 32, "softmax", "score_first")
    yield "E = 1024, K = 32", torch.float32
    _router(256, 8, "sigmoid", "score_first", ExpertGroups(8, 4))
    yield "4 of 8 groups", torch.float32

    attack_steps(meta(8, 3, 224, 224, dtype=torch.float32))
    yield "", torch.bfloat16


def attack_steps(point: Tensor) -> None:
    """Both steps of a float32 master (B, …) for a model in bfloat16."""
    image = torch.empty_like(point, dtype=torch.bfloat16)
    radius = point.new_empty(len(point))
    filled = {"moved": point, "image": image}
    attack_step.launch_linf_step(point, image, point, point, radius, **filled)
    attack_step.launch_l2_step(point, image, point, radius, (0.0, 1.0), radius, **filled)


def expert(
    dtype: torch.dtype,
    rows: int,
    activation: str,
    *,
    precision: str = "ieee",
    sizes: tuple[int, int] = SIZES,
    E: int = E,
    transposed: bool = False,
    bias: bool = True,
) -> Iterator[str]:
    """Inference, forward and every backward of ``E`` experts of ``rows`` rows: the name of each
    step, after it was taken.

    transposed: the weights lie in memory with their axes exchanged, as gpt-oss's do.
    """
    D, F = sizes
    num_rows = rows * E
    tokens = num_rows // K
    wide = 2 * F if activation in GATED_ACTIVATIONS else F
    x = meta(tokens, D, dtype=dtype)
    w_in = meta(E, wide, D, dtype=dtype)
    w_out = meta(E, D, F, dtype=dtype)
    if transposed:
        w_in, w_out = (w.mT.contiguous().mT for w in (w_in, w_out))
    b_in, b_out = (meta(E, wide, dtype=dtype), meta(E, D, dtype=dtype)) if bias else (None, None)
    row_token, row_slot, slot_row = index(num_rows, tokens)
    offsets, gates = meta(E + 1), gates_of(tokens)
    tiles = dispatch.plan_tiles(offsets, num_rows, dtype)
    yield f"{rows} rows an expert"

    def product(
        x: Tensor, w: Tensor, bias: Tensor | None, index: Tensor | None, activation: str, keep: bool
    ) -> Any:
        return grouped_matmul.grouped_matmul(
            x,
            w,
            bias,
            offsets,
            tiles,
            row_token=index,
            activation=activation,
            keep_hidden=keep,
            precision=precision,
        )

    product(x, w_in, b_in, row_token, activation, False)
    yield f"up, {activation}, inference"
    hidden, activated = product(x, w_in, b_in, row_token, activation, True)
    yield f"up, {activation}, H kept"
    out, _ = product(activated, w_out, b_out, None, "none", True)
    yield "down"
    dy = combine.combine(out, gates, slot_row)
    yield "with gates"
    for gated in (False, True):
        hidden_gradient.hidden_gradient(
            dy,
            gates,
            w_out,
            b_out,
            hidden,
            Dispatch(offsets, row_token, row_slot, slot_row),
            tiles=tiles,
            activation=activation,
            precision=precision,
            want_gates=True,
            want_hidden=True,
            want_gated=gated,
        )
        yield f"{activation}, units for dW₂" if gated else activation
    d_rows, _ = product(hidden, w_in.transpose(1, 2), None, None, "none", True)
    yield "dX of each row"
    combine.combine(d_rows, None, slot_row)
    yield "dX"
    weight_gradient.weight_gradient(hidden, None, x, row_token, offsets, precision)
    yield "dW₁"
    weight_gradient.weight_gradient(dy, row_token, activated, None, offsets, precision)
    yield "dW₂"
    weight_gradient.weight_gradient(out, None, activated, None, offsets, precision)
    yield "dW, rows in order"
    weight_gradient.expert_sum(hidden, offsets)
    yield "db₁"
    weight_gradient.expert_sum(dy, offsets, gates, row_token, row_slot)
    yield "db₂"


def index(rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """row_token (R,), row_slot (R,) and slot_row (T, K)."""
    return meta(rows), meta(rows), meta(tokens, rows // tokens)


def gates_of(tokens: int, top_k: int = K) -> Tensor:
    """Gates (T, K)."""
    return meta(tokens, top_k, dtype=torch.float32)


def _router(
    num_experts: int, top_k: int, score: str, order: str, groups: ExpertGroups | None = None
) -> None:
    logits = meta(4096, num_experts, dtype=torch.float32)
    rule = GateRule(score, order, renormalize=True)
    gates, experts = topk.route(logits, top_k, rule, groups=groups)
    topk.route_backward(gates, logits, experts, rule)
