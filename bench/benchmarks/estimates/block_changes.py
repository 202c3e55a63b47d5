"""Estimates of a product with other blocks than the table has."""

import torch

from ironmoe.bench.benchmarks.block_tables import patched, table_of
from ironmoe.bench.benchmarks.estimates.estimate import EstimateError, KernelEstimate, pass_estimate
from ironmoe.bench.benchmarks.estimates.static_model import Machine
from ironmoe.bench.benchmarks.passes import FULL
from ironmoe.bench.benchmarks.shapes import Shape
from ironmoe.kernels import tuning
from ironmoe.kernels.activations import GATED_ACTIVATIONS, INTERLEAVED_ACTIVATIONS
from ironmoe.kernels.tuning import Blocks, rows_per_tile


def changed(shape: Shape, text: str, machine: Machine) -> tuple[str, Blocks]:
    """Read a change of blocks such as "activated stages=3 split=8": a product, and the fields in
    which its blocks differ from its row of the table.

    Returns:
        (product, its blocks)

    Raises:
        EstimateError: no such product, one that the shape does not use, or no such field.
    """
    product, *fields = text.split()
    launched = _products_of(shape)
    if product not in launched:
        raise EstimateError(
            f"--blocks: {product!r} is no product of {shape.name}, whose products are "
            f"{', '.join(launched)}"
        )

    rows = rows_per_tile(shape.rows, shape.num_experts, torch.bfloat16)
    present: Blocks = getattr(tuning, table_of(product, torch.bfloat16, rows, machine.chip))[
        product
    ]
    changes = dict(field.partition("=")[::2] for field in fields)

    for name, value in changes.items():
        if name not in Blocks._fields or not value.isdigit():
            raise EstimateError(
                f"--blocks: {name}={value} is no number for a field of {', '.join(Blocks._fields)}"
            )

    return product, Blocks(
        **(present._asdict() | {name: int(value) for name, value in changes.items()})
    )


def with_blocks(
    shape: Shape, machine: Machine, product: str, blocks: Blocks | None
) -> list[KernelEstimate]:
    """The estimates of the kernels that take their blocks from the product's row of the table, with
    ``blocks`` in that row; None leaves the row as it is."""
    rows = rows_per_tile(shape.rows, shape.num_experts, torch.bfloat16)
    table = table_of(product, torch.bfloat16, rows, machine.chip)
    with patched(table, product, blocks or getattr(tuning, table)[product]):
        return list(pass_estimate(shape, FULL, machine, _products_of(shape)[product]))


def _products_of(shape: Shape) -> dict[str, tuple[str, ...]]:
    """The rows of the table of blocks that the layer uses, and the kernels that use each."""
    interleaved = shape.activation in INTERLEAVED_ACTIVATIONS
    gated = shape.activation in GATED_ACTIVATIONS
    up = "interleaved" if interleaved else "gated" if gated else "activated"

    return {
        up: ("up product",),
        "plain": ("down product", "input gradient"),
        "hidden_gradient_interleaved" if interleaved else "hidden_gradient": ("hidden gradient",),
        "weight_gradient": ("weight gradient in", "weight gradient out"),
    }
