"""Put another row into a table of block sizes in ``kernels/tuning.py`` for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ironmoe.kernels import tuning
from ironmoe.kernels.tuning import Blocks, Chip, blocks_for

TABLES = ("WIDE", "BLACKWELL", "WITHOUT_TMA", "FLOAT32")


@contextmanager
def patched(table: str, product: str, blocks: Blocks) -> Iterator[None]:
    """Inside the block, the product has these blocks in the table."""
    rows: dict[str, Blocks] = getattr(tuning, table)
    before = rows[product]
    rows[product] = blocks
    try:
        yield
    finally:
        rows[product] = before


def table_of(product: str, dtype: torch.dtype, rows: int, chip: Chip) -> str:
    """The name of the table that the product's blocks come from here. It is found by changing each.

    Raises:
        LookupError: they come from none.
    """
    for table in TABLES:
        with patched(table, product, Blocks(16, 16, 16, warps=2)):
            if blocks_for(product, dtype, rows, chip).warps == 2:
                return table
    raise LookupError(f"none of {TABLES} has the blocks of {product} in {dtype} on {chip.name}")
