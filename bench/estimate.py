"""``ironmoe bench roofline --estimate``: the static model of every product of a layer beside its limit and, if there is one, its measurement.

The kernels are recorded on meta tensors and compiled for the chip, whether it is here or not.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ironmoe.bench.passes import FULL, INFERENCE
from ironmoe.bench.roofline import Work, layer_work, needed_flops
from ironmoe.bench.shapes import Shape
from ironmoe.bench.static_model import ELEMENT, LAUNCH_GAP_MS, Estimate, Machine, Product, estimate, expected_tiles
from ironmoe.bench.tune import patched, table_of
from ironmoe.kernels.tuning import Blocks, Chip, assume, rows_per_tile

if TYPE_CHECKING:
    from ironmoe.kernels.compile_report import Finding
    from ironmoe.kernels.gpu.launch import Launch

RESULTS = Path(__file__).with_name("results")


class KernelEstimate(NamedTuple):
    """One kernel of a pass on a machine, in ms. What has no model is taken at its limit: ``finding``, ``product``, ``model`` are None."""

    kernel: str
    limit: float
    ms: float
    finding: "Finding | None" = None
    product: Product | None = None
    model: Estimate | None = None


def pass_estimate(shape: Shape, pass_name: str, machine: Machine) -> Iterator[KernelEstimate]:
    """The kernels of one bf16 pass in their order; each is yielded as soon as it is compiled, which takes seconds the first time.

    Raises:
        ImportError: Triton is not installed.
    """
    from ironmoe.kernels.compile_report import examine
    from ironmoe.kernels.specimens import Specimen

    launches = product_launches(shape, machine.chip)
    for work in layer_work(shape, pass_name):
        limit = work.ms_at(machine.tflops, machine.terabytes)
        step = _step(work, shape, pass_name)
        if step is None:
            yield KernelEstimate(work.kernel, limit, limit + LAUNCH_GAP_MS)
            continue
        finding = examine(Specimen(work.kernel, torch.bfloat16, launches[step]), machine.chip)
        if finding.error:
            raise RuntimeError(f"{work.kernel} does not compile for {machine.chip.name}: {finding.error}")
        product = as_product(launches[step], finding, shape)
        model = estimate(product, machine)
        yield KernelEstimate(work.kernel, limit, max(limit, model.ms) + LAUNCH_GAP_MS, finding, product, model)


def with_blocks(
    shape: Shape, pass_name: str, machine: Machine, product: str, kernel: str, candidates: tuple[Blocks, ...]
) -> Iterator[tuple[Blocks, KernelEstimate]]:
    """``kernel`` of a pass under each of some rows of the table for ``product`` (a name of ``tuning.PRODUCTS``)."""
    rows = rows_per_tile(shape.rows, shape.num_experts, torch.bfloat16)
    table = table_of(product, torch.bfloat16, rows, machine.chip)
    for blocks in candidates:
        with patched(table, product, blocks):
            yield blocks, next(found for found in pass_estimate(shape, pass_name, machine) if found.kernel == kernel)


def product_launches(shape: Shape, chip: Chip) -> dict[str, "Launch"]:
    """The products of forward and backward by the names of their steps, as they would be launched on ``chip``."""
    from ironmoe.kernels.gpu.launch import observe
    from ironmoe.kernels.specimens import expert

    rows = max(1, shape.rows // shape.num_experts)
    found = {}
    with assume(chip), observe() as launches:
        for step in expert(
            torch.bfloat16, rows, shape.activation, sizes=(shape.dim, shape.hidden), E=shape.num_experts, bias=shape.bias
        ):
            found |= {step: launch for launch in launches if "BLOCK_N" in launch.arguments}
            launches.clear()
    return found


def as_product(launch: "Launch", finding: "Finding", shape: Shape) -> Product:
    """What the static model knows of a launch."""
    a = launch.arguments
    m, n, k = a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"]
    if "GATED" in a:
        blocks = expected_tiles(shape.rows, shape.num_experts, m) * -(-a["N"] // n)
        terms = a["K"]
    else:  # the weight gradient: a block of every expert's matrix, over the expert's rows
        blocks = shape.num_experts * -(-a["M"] // m) * -(-a["N"] // n)
        terms = -(-shape.rows // shape.num_experts)
    columns = n * (2 if a.get("GATED") and "activated" in a else 1)
    code = sum(finding.instructions.values())
    return Product(
        m, columns, k, -(-terms // k), blocks, m * _epilogue_columns(a) * ELEMENT, finding.warps, finding.registers,
        finding.shared, code,
    )  # fmt: skip


def _epilogue_columns(a: "dict[str, object]") -> int:
    """Columns of a tile that the epilogue reads and writes."""
    n = int(str(a["BLOCK_N"]))
    if "d_hidden" in a:  # H in, dH and gated units out
        wide = n * (2 if a["GATED"] or a["INTERLEAVED"] else 1)
        return 2 * wide + (n if a["gated"] is not None else 0)
    if "hidden" not in a:
        return n
    wide = n * (2 if a["GATED"] else 1)
    units = n // (2 if a["INTERLEAVED"] else 1)
    return (wide if a["hidden"] is not None else 0) + (units if a["activated"] is not None else 0)


def _step(work: Work, shape: Shape, pass_name: str) -> str | None:
    """The step of ``specimens.expert`` that launches the product of ``work``; None for what is no product."""
    activation = shape.activation
    return {
        "up product": f"up, {activation}, inference" if pass_name == INFERENCE else f"up, {activation}, H kept",
        "down product": "down",
        "hidden gradient": f"{activation}, units for dW₂" if pass_name == FULL else activation,
        "input gradient": "dX of each row",
        "weight gradient in": "dW₁",
        "weight gradient out": "dW₂",
    }.get(work.kernel)


def measured_ms(shape: Shape, pass_name: str, machine: Machine, folder: Path = RESULTS) -> float | None:
    """The newest measurement of the layer under a uniform routing on that machine in ``bench/results``; None without one."""
    found = None
    for path in sorted(folder.glob("*gpu*.json"), key=lambda path: path.stat().st_mtime):
        results = json.loads(path.read_text())
        if machine.name not in json.dumps(results.get("versions", results.get("device", ""))):
            continue
        for row in results.get("rows", []):
            at = row.get("shape"), row.get("pass"), row.get("implementation"), row.get("routing"), row.get("dtype")
            if at == (shape.name, pass_name, "ironmoe", "uniform", "bfloat16"):
                found = float(row["ms"])
    return found


def estimated_tflops(shape: Shape, pass_name: str, kernels: list[KernelEstimate]) -> float:
    """TFLOP/s of needed FLOPs."""
    return needed_flops(shape, pass_name) / sum(kernel.ms for kernel in kernels) * 1e-9
