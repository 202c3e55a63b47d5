"""One launch of every kernel at every configuration of the tuning table, recorded on meta tensors: no memory, no GPU."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.kernels.activations import ACTIVATIONS, GATED_ACTIVATIONS
from ironmoe.kernels.gpu import attack_step, combine, dispatch, grouped_matmul, hidden_gradient, topk, weight_gradient
from ironmoe.kernels.gpu.launch import Launch, observe
from ironmoe.kernels.topk import ExpertGroups
from ironmoe.kernels.tuning import Chip, assume

D, F, E, K = 2048, 768, 128, 8  # Qwen3-30B-A3B: every size a multiple of every block
ROWS = (16, 32, 64, 128)  # an expert's rows, one for each BLOCK_M
DTYPES = (torch.bfloat16, torch.float32)  # float16 takes the configurations of bfloat16
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Specimen(NamedTuple):
    """A launch and what it is, in words."""

    name: str
    dtype: torch.dtype
    launch: Launch


def specimens(chip: Chip) -> list[Specimen]:
    """Every kernel as it would be launched on ``chip``, each configuration once."""
    found: dict[tuple[object, ...], Specimen] = {}
    for name, dtype, run in _cases():
        with assume(chip), observe() as launches:
            run()
        for launch in launches:
            constants = tuple(
                (k, v) for k, v in launch.arguments.items() if not isinstance(v, Tensor | None) and "TMA" not in k and k.isupper()
            )
            dtypes = tuple(getattr(v, "dtype", None) for v in launch.arguments.values())
            kept = tuple(v is None for v in launch.arguments.values())
            key = (launch.kernel, constants, dtypes, kept, launch.num_warps, launch.num_stages)
            found.setdefault(key, Specimen(f"{_title(launch)} {name}".strip(), dtype, launch))
    return list(found.values())


def _title(launch: Launch) -> str:
    return str(launch.kernel.__name__).removesuffix("_kernel")


def _meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _cases() -> Iterator[tuple[str, torch.dtype, Callable[[], object]]]:
    for dtype in DTYPES:
        for rows in ROWS if dtype == torch.bfloat16 else ROWS[:2]:
            full = rows == ROWS[-1] and dtype == torch.bfloat16
            for activation in ACTIVATIONS if full else ("gelu", "swiglu"):
                yield activation, dtype, lambda d=dtype, r=rows, a=activation: _expert(d, r, a)  # type: ignore[misc]
        yield "", dtype, lambda d=dtype: combine.combine_backward(  # type: ignore[misc]
            _meta(64, D, dtype=d), _meta(64 * K, D, dtype=d), _gates(64), *_index(64 * K, 64), True, True
        )  # fmt: skip
    yield "tf32", torch.float32, lambda: _expert(torch.float32, ROWS[1], "gelu", "tf32")
    yield "", torch.int32, lambda: dispatch.plan(_meta(4096, K), E)
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        for order in ("score_first", "topk_first"):
            yield f"{score} {order}", torch.float32, lambda s=score, o=order: _router(E, K, s, o)  # type: ignore[misc]
    yield "E=1024 K=32", torch.float32, lambda: _router(1024, 32, "softmax", "score_first")
    yield "groups", torch.float32, lambda: _router(256, 8, "sigmoid", "score_first", ExpertGroups(8, 4))
    yield "", torch.bfloat16, _attack


def _expert(dtype: torch.dtype, rows: int, activation: str, precision: str = "ieee") -> None:
    """Inference, forward and every backward of the expert, with biases."""
    num_rows = rows * E
    tokens = num_rows // K
    wide = 2 * F if activation in GATED_ACTIVATIONS else F
    x, w_in, w_out = _meta(tokens, D, dtype=dtype), _meta(E, wide, D, dtype=dtype), _meta(E, D, F, dtype=dtype)
    b_in, b_out = _meta(E, wide, dtype=dtype), _meta(E, D, dtype=dtype)
    row_token, row_slot, slot_row = _index(num_rows, tokens)
    offsets, gates = _meta(E + 1), _gates(tokens)
    tiles = dispatch.plan_tiles(offsets, num_rows, dtype)
    for keep in (False, True):
        hidden, activated = grouped_matmul.grouped_matmul(
            x, w_in, b_in, offsets, tiles, row_token, activation, keep, precision
        )  # fmt: skip
    assert hidden is not None and activated is not None
    out, _ = grouped_matmul.grouped_matmul(activated, w_out, b_out, offsets, tiles, None, "none", True, precision)
    assert out is not None
    dy = combine.combine(out, gates, slot_row)
    for wants in ((True, True, False), (True, True, True)):
        hidden_gradient.hidden_gradient(
            dy, gates, w_out, b_out, hidden, offsets, row_token, row_slot, slot_row, tiles, activation, precision, *wants
        )  # fmt: skip
    d_rows, _ = grouped_matmul.grouped_matmul(hidden, w_in.transpose(1, 2), None, offsets, tiles, None, "none", True, precision)
    assert d_rows is not None
    combine.combine(d_rows, None, slot_row)
    weight_gradient.weight_gradient(hidden, None, x, row_token, offsets, precision)
    weight_gradient.weight_gradient(dy, row_token, activated, None, offsets, precision)
    weight_gradient.expert_sum(hidden, offsets)
    weight_gradient.expert_sum(dy, offsets, gates, row_token, row_slot)


def _index(rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return _meta(rows), _meta(rows), _meta(tokens, rows // tokens)


def _gates(tokens: int) -> Tensor:
    return _meta(tokens, K, dtype=torch.float32)


def _router(num_experts: int, top_k: int, score: str, order: str, groups: ExpertGroups | None = None) -> None:
    logits = _meta(4096, num_experts, dtype=torch.float32)
    gates, experts = topk.route(logits, top_k, score, order, True, None, groups, 1.0)
    topk.route_backward(gates, logits, experts, score, order, True, 1.0)


def _attack() -> None:
    shape = (8, 3, 224, 224)
    master, image, radius = _meta(*shape, dtype=torch.float32), _meta(*shape, dtype=torch.bfloat16), _meta(8, dtype=torch.float32)
    attack_step.launch_linf_step(master, image, master, master, radius, master, image)
    attack_step.launch_l2_step(master, image, master, radius, 0.0, 1.0, radius, master, image)
