"""The time of every kernel of a layer by the static model.

The kernels are recorded on meta tensors and compiled for the chip, whether it is here or not.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ironmoe.bench.benchmarks.estimates.static_model import (
    ELEMENT,
    LAUNCH_GAP_MS,
    Estimate,
    Machine,
    Product,
    estimate,
    expected_tiles,
)
from ironmoe.bench.benchmarks.passes import FULL, INFERENCE
from ironmoe.bench.benchmarks.roofline import Work, layer_work
from ironmoe.bench.benchmarks.shapes import Shape
from ironmoe.bench.common.user_error import UserError
from ironmoe.kernels.tuning import Chip, assume

if TYPE_CHECKING:
    from ironmoe.kernels.compile.report import Finding
    from ironmoe.kernels.gpu.launch import Launch


class EstimateError(UserError):
    """No estimate can be made as asked; the message says why."""


class KernelEstimate(NamedTuple):
    """One kernel of a pass on a machine. limit, ms: in milliseconds.

    A kernel that has no model is taken at its limit; ``finding``, ``product`` and ``model`` are
    None then.
    """

    kernel: str
    limit: float
    ms: float
    finding: "Finding | None" = None
    product: Product | None = None
    model: Estimate | None = None


def pass_estimate(
    shape: Shape, pass_name: str, machine: Machine, only: tuple[str, ...] | None = None
) -> Iterator[KernelEstimate]:
    """Estimate the kernels of one bf16 pass, in the order they run. Each is yielded as soon as it
    is compiled, which takes seconds the first time.

    Args:
        only: names of ``Work``; None is all of them.

    Raises:
        EstimateError: a kernel does not compile or does not fit on an SM.
    """
    from ironmoe.kernels.compile.launches import NamedLaunch
    from ironmoe.kernels.compile.report import examine

    launches = product_launches(shape, machine.chip)
    for work in layer_work(shape, pass_name, machine.chip):
        if only is not None and work.kernel not in only:
            continue

        limit = work.ms_at(machine.tflops, machine.terabytes)
        step = _step(work, shape, pass_name)
        if step is None:
            yield KernelEstimate(work.kernel, limit, limit + LAUNCH_GAP_MS)
            continue

        finding = examine(NamedLaunch(work.kernel, torch.bfloat16, launches[step]), machine.chip)
        if finding.error:
            raise EstimateError(
                f"{work.kernel} does not compile for {machine.chip.name}: {finding.error}"
            )

        product = as_product(launches[step], finding, shape)
        try:
            model = estimate(product, machine)
        except ValueError as error:
            raise EstimateError(f"{work.kernel}: {error}") from None

        yield KernelEstimate(
            work.kernel, limit, max(limit, model.ms) + LAUNCH_GAP_MS, finding, product, model
        )


def product_launches(shape: Shape, chip: Chip) -> dict[str, "Launch"]:
    """The products of forward and backward, as they would be launched on ``chip``, by the names of
    their steps."""
    from ironmoe.kernels.compile.launches import expert
    from ironmoe.kernels.gpu.launch import observe

    rows = max(1, shape.rows // shape.num_experts)
    found = {}
    with assume(chip), observe() as launches:
        for step in expert(
            torch.bfloat16,
            rows,
            shape.activation,
            sizes=(shape.dim, shape.hidden),
            E=shape.num_experts,
            bias=shape.bias,
        ):
            found[step] = (
                launches[-1] if len(launches) == 1 else next(x for x in launches if x.tile)
            )
            launches.clear()

    return found


def as_product(launch: "Launch", finding: "Finding", shape: Shape) -> Product:
    """What the static model has to know of a launch."""
    a = launch.arguments
    assert launch.tile is not None
    rows, columns, terms = launch.tile
    unit = a.get("UNIT")
    if unit is not None:
        programs = expected_tiles(shape.rows, shape.num_experts, rows) * -(-a["N"] // columns)
        all_terms = a["K"]
    else:  # the weight gradient: a block of every expert's matrix, over the expert's rows
        programs = shape.num_experts * -(-a["M"] // rows) * -(-a["N"] // columns)
        all_terms = -(-shape.rows // shape.num_experts)

    halves = unit.halves if unit is not None and "activated" in a else 1
    return Product(
        m=rows,
        n=columns * halves,
        k=terms,
        steps=-(-all_terms // terms),
        programs=programs,
        epilogue_bytes=rows * _epilogue_columns(columns, a) * ELEMENT,
        warps=finding.warps,
        registers=finding.registers,
        shared=finding.shared,
        code=sum(finding.instructions.values()),
    )


def _epilogue_columns(n: int, a: "dict[str, Any]") -> int:
    """How many columns of a tile of ``n`` the epilogue reads and writes."""
    if "d_hidden" in a:  # H in, dH and gated units out
        wide = n * (2 if a["UNIT"].gated or a["UNIT"].interleaved else 1)
        return 2 * wide + (n if a["gated"] is not None else 0)
    if "hidden" not in a:
        return n
    wide = n * a["UNIT"].halves
    units = n // (2 if a["UNIT"].interleaved else 1)
    return (wide if a["hidden"] is not None else 0) + (units if a["activated"] is not None else 0)


def _step(work: Work, shape: Shape, pass_name: str) -> str | None:
    """The step of ``launches.expert`` that launches the product of ``work``; None for what is no
    product.
    """
    activation = shape.activation
    return {
        "up product": f"up, {activation}, inference"
        if pass_name == INFERENCE
        else f"up, {activation}, H kept",
        "down product": "down",
        "hidden gradient": f"{activation}, units for dW₂" if pass_name == FULL else activation,
        "input gradient": "dX of each row",
        "weight gradient in": "dW₁",
        "weight gradient out": "dW₂",
    }.get(work.kernel)
