"""Block sizes: a small table by product, chip and dtype, and a rule for BLOCK_M by the rows an
expert gets on average.

Never keyed by T itself: another batch size compiles nothing and tunes nothing. Imports no triton.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Chip(NamedTuple):
    """What a kernel's configuration depends on. shared_memory: bytes a program may use; processors:
    SMs or CUs."""

    name: str
    shared_memory: int
    tma: bool = False
    processors: int = 132
    warp_size: int = 32


CHIPS = {
    "sm_80": Chip("sm_80", 166_912, processors=108),
    "sm_86": Chip("sm_86", 101_376, processors=84),
    "sm_89": Chip("sm_89", 101_376, processors=128),
    "sm_90": Chip("sm_90", 232_448, tma=True),
    "sm_100": Chip("sm_100", 232_448, tma=True, processors=148),
    "sm_120": Chip("sm_120", 101_376, processors=170),
    "gfx942": Chip("gfx942", 65_536, processors=304, warp_size=64),
}
# How the instruction of each chip that multiplies matrices is called.
MATRIX = dict.fromkeys(CHIPS, "mma.sync") | {
    "sm_90": "wgmma",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
INTERPRETER = Chip("interpreter", 1 << 30, tma=True, processors=4)


class Blocks(NamedTuple):
    """One configuration. ``n`` counts columns of one accumulator (a gated unit has two, an
    interleaved one a wide one for both halves), ``k`` the terms a step adds up.

    stages: of the pipeline, as Triton counts them; group: tiles that share a block of columns;
    split: parts the epilogue works through; persistent: one program a processor; box: TMA brings
    gate and up together, for one product; preload: ``hidden_gradient`` asks for H before its
    product, not after it, and stores through TMA.
    """

    m: int
    n: int
    k: int
    warps: int = 8
    stages: int = 3
    group: int = 8
    split: int = 1
    persistent: bool = False
    box: bool = True
    preload: bool = False


# Product → blocks for 128 rows a tile and 16-bit numbers. What the compiler says of each:
# docs/compile-report.md.
WIDE = {
    "gated": Blocks(128, 128, 64, split=2),
    "interleaved": Blocks(128, 256, 64, split=4),
    "activated": Blocks(128, 128, 64, split=4),
    "plain": Blocks(128, 256, 64, split=2),
    "hidden_gradient": Blocks(128, 128, 64, stages=5, split=4, preload=True),
    "hidden_gradient_interleaved": Blocks(128, 128, 64, stages=5, split=4, preload=True),
    "weight_gradient": Blocks(128, 256, 64, stages=7),
}
BLACKWELL = WIDE | {
    "activated": Blocks(128, 128, 64, split=8),
    "hidden_gradient": Blocks(128, 128, 64, split=8),
    "hidden_gradient_interleaved": Blocks(128, 128, 64, split=8),
}
WITHOUT_TMA = {  # the pointers of the weights take the registers of half the columns
    "gated": Blocks(128, 64, 64, split=2),
    "interleaved": Blocks(128, 128, 64, split=2),
    "activated": Blocks(128, 128, 64, split=2),
    "plain": Blocks(128, 128, 64, split=2),
    "hidden_gradient": Blocks(128, 64, 64, split=4),
    "hidden_gradient_interleaved": Blocks(128, 64, 64, split=4),
    "weight_gradient": Blocks(128, 128, 64),
}
# For rows whose stride is no multiple of 16: every element then has an address of its own, and
# addresses take registers.
UNALIGNED = {
    "gated": Blocks(128, 32, 32),
    "interleaved": Blocks(128, 64, 32),
    "activated": Blocks(128, 32, 32),
    "plain": Blocks(128, 64, 32),
    "hidden_gradient": Blocks(128, 32, 32, split=4),
    "hidden_gradient_interleaved": Blocks(128, 32, 32, split=2),
    "weight_gradient": Blocks(128, 128, 64),
}
FLOAT32 = {  # no tensor cores in "ieee": small tiles, few registers
    "gated": Blocks(32, 32, 32, warps=4, stages=2),
    "interleaved": Blocks(32, 64, 32, warps=4, stages=2),
    "activated": Blocks(32, 64, 32, warps=4, stages=2),
    "plain": Blocks(32, 64, 32, warps=4, stages=2),
    "hidden_gradient": Blocks(32, 64, 32, warps=4, stages=2),
    "hidden_gradient_interleaved": Blocks(32, 64, 32, warps=4, stages=2),
    "weight_gradient": Blocks(32, 64, 32, stages=2),
}
PRODUCTS = tuple(WIDE)
_assumed: list[Chip] = []


@contextmanager
def assume(chip: Chip) -> Iterator[None]:
    """Choose configurations as on ``chip``, whatever is here. For the compile report."""
    _assumed.append(chip)
    try:
        yield
    finally:
        _assumed.pop()


def chip_of(tensor: Tensor) -> Chip:
    """The chip a tensor lies on. An unknown chip counts as the nearest older one that is known."""
    if _assumed:
        return _assumed[-1]
    return _cuda_chip(tensor.device) if tensor.device.type == "cuda" else INTERPRETER


@cache  # asked at every launch
def _cuda_chip(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return CHIPS["gfx942"]._replace(processors=properties.multi_processor_count)
    version = properties.major * 10 + properties.minor
    known = max((number for number in (80, 86, 89, 90, 100, 120) if number <= version), default=80)
    return CHIPS[f"sm_{known}"]._replace(processors=properties.multi_processor_count)


def rows_per_tile(num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """BLOCK_M: the power of two next to the rows of an average expert, 16 to 128 (float32: at most
    32)."""
    block, largest = 16, 32 if dtype == torch.float32 else 128
    # comparisons, which torch.compile can keep symbolic
    while block < largest and num_rows // max(num_experts, 1) > block:
        block *= 2
    return block


def blocks_for(
    product: str, dtype: torch.dtype, rows: int, chip: Chip, aligned: bool = True
) -> Blocks:
    """The configuration of one product: ``rows`` as ``rows_per_tile`` says (the weight gradient has
    none of its own); ``aligned``: all strides are multiples of 16."""
    if dtype == torch.float32:
        blocks = FLOAT32[product]
    elif not aligned:
        blocks = UNALIGNED[product]
    elif not chip.tma or chip.shared_memory < 200_000:
        blocks = WITHOUT_TMA[product]
    else:
        blocks = (BLACKWELL if chip.name == "sm_100" else WIDE)[product]
    if product != "weight_gradient" and rows < blocks.m:
        blocks = blocks._replace(m=rows, n=min(blocks.n, 128), warps=4)
        # With so few rows several programs of a processor hide the wait for memory. They need the
        # registers that a preloaded H would take.
        if blocks.preload:
            parts = 8 if product == "hidden_gradient_interleaved" else 4
            blocks = blocks._replace(stages=3, split=parts, preload=False)
        if rows <= 32:
            through_unit = product.startswith("hidden_gradient")
            blocks = blocks._replace(
                n=min(blocks.n, 64 if through_unit else 128), split=2 if through_unit else 1
            )
    stages = blocks.stages
    while stages > 1 and _shared_bytes(product, blocks, stages, dtype) > chip.shared_memory:
        stages -= 1
    return blocks._replace(stages=stages)


def _shared_bytes(product: str, blocks: Blocks, stages: int, dtype: torch.dtype) -> int:
    """Shared memory of a program: what the pipeline holds, and the part of the results that TMA
    takes out at once.

    In the weight gradient the load of the tokens takes a stage, too, so two make a step of both
    operands. Its results leave by pointers, through memory that the pipeline has given back.
    """
    columns = blocks.n * (2 if product == "gated" else 1)
    step = (blocks.m + columns) * blocks.k
    if product == "weight_gradient":
        return dtype.itemsize * step * ((stages + 1) // 2)

    leaving = 2 if product == "hidden_gradient_interleaved" else 1  # gate and up leave as pairs
    return dtype.itemsize * (step * stages + leaving * blocks.m * blocks.n // blocks.split)


def max_tiles(num_rows: int, num_groups: int, block_m: int) -> int:
    """The largest number of tiles that any split of the rows into groups can make: the grid's
    bound, known on the host."""
    if num_rows <= num_groups:
        return num_rows
    return num_groups - 1 - (num_groups - num_rows - 1) // block_m
