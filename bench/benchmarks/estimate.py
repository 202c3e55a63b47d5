"""``ironmoe bench roofline --estimate``: the static model of every product of a layer beside its
limit and, if there is one, its measurement.

The kernels are recorded on meta tensors and compiled for the chip, whether it is here or not.
"""

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ironmoe.bench.benchmarks.block_tables import patched, table_of
from ironmoe.bench.benchmarks.gpu.jobs import CASE, Job
from ironmoe.bench.benchmarks.gpu.report import GOAL_DEVICES
from ironmoe.bench.benchmarks.passes import DX, FORWARD, FULL, INFERENCE
from ironmoe.bench.benchmarks.peers import OURS
from ironmoe.bench.benchmarks.roofline import Work, layer_work, needed_flops
from ironmoe.bench.benchmarks.shapes import Shape
from ironmoe.bench.benchmarks.static_model import (
    ELEMENT,
    LAUNCH_GAP_MS,
    Estimate,
    Machine,
    Product,
    estimate,
    expected_tiles,
)
from ironmoe.kernels import tuning
from ironmoe.kernels.activations import GATED_ACTIVATIONS, INTERLEAVED_ACTIVATIONS
from ironmoe.kernels.tuning import Blocks, Chip, assume, rows_per_tile

if TYPE_CHECKING:
    from rich.console import Console

    from ironmoe.kernels.compile.report import Finding
    from ironmoe.kernels.gpu.launch import Launch

RESULTS = Path(__file__).parents[1] / "results"
PASSES_SHOWN = (INFERENCE, FORWARD, DX, FULL)


class EstimateError(Exception):
    """No estimate can be made as asked; the message says why."""


class KernelEstimate(NamedTuple):
    """One kernel of a pass on a machine, in ms. What has no model is taken at its limit:
    ``finding``, ``product``, ``model`` are None.
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
    """The kernels of one bf16 pass in their order; each is yielded as soon as it is compiled, which
    takes seconds the first time.

    Args:
        only: names of ``Work``; None is all of them.

    Raises:
        EstimateError: a kernel does not compile or does not fit on an SM.
    """
    from ironmoe.kernels.compile.launches import NamedLaunch
    from ironmoe.kernels.compile.report import examine

    launches = product_launches(shape, machine.chip)
    for work in layer_work(shape, pass_name):
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


def changed(shape: Shape, text: str, machine: Machine) -> tuple[str, Blocks]:
    """(product, its blocks) out of "activated stages=3 split=8": fields that differ from the
    present row of the table.

    Raises:
        EstimateError: no such product, one that the shape has no use for, or no such field.
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
    """The kernels of a full pass that take their blocks from that row of the table, with another
    row; None: with the present one.
    """
    rows = rows_per_tile(shape.rows, shape.num_experts, torch.bfloat16)
    table = table_of(product, torch.bfloat16, rows, machine.chip)
    with patched(table, product, blocks or getattr(tuning, table)[product]):
        return list(pass_estimate(shape, FULL, machine, _products_of(shape)[product]))


def _products_of(shape: Shape) -> dict[str, tuple[str, ...]]:
    """Rows of the table of blocks that the layer uses, and the kernels that take each."""
    interleaved = shape.activation in INTERLEAVED_ACTIVATIONS
    up = (
        "interleaved"
        if interleaved
        else "gated"
        if shape.activation in GATED_ACTIVATIONS
        else "activated"
    )
    return {
        up: ("up product",),
        "plain": ("down product", "input gradient"),
        "hidden_gradient_interleaved" if interleaved else "hidden_gradient": ("hidden gradient",),
        "weight_gradient": ("weight gradient in", "weight gradient out"),
    }


def product_launches(shape: Shape, chip: Chip) -> dict[str, "Launch"]:
    """The products of forward and backward by the names of their steps, as they would be launched
    on ``chip``.
    """
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
    """What the static model knows of a launch."""
    a = launch.arguments
    assert launch.tile is not None
    m, n, k = launch.tile
    unit = a.get("UNIT")
    if unit is not None:
        blocks = expected_tiles(shape.rows, shape.num_experts, m) * -(-a["N"] // n)
        terms = a["K"]
    else:  # the weight gradient: a block of every expert's matrix, over the expert's rows
        blocks = shape.num_experts * -(-a["M"] // m) * -(-a["N"] // n)
        terms = -(-shape.rows // shape.num_experts)
    columns = n * (unit.halves if unit is not None and "activated" in a else 1)
    code = sum(finding.instructions.values())
    return Product(
        m, columns, k, -(-terms // k), blocks, m * _epilogue_columns(n, a) * ELEMENT, finding.warps,
        finding.registers,
        finding.shared, code,
    )  # fmt: skip


def _epilogue_columns(n: int, a: "dict[str, Any]") -> int:
    """Columns of a tile that the epilogue reads and writes, where the product has ``n``."""
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


class Measured(NamedTuple):
    """What ``make gpu`` measured of a pass, in ms, and the GPU's full name."""

    ms: float
    device: str


def measured(
    shape: Shape, pass_name: str, machine: Machine, folder: Path | None = None
) -> Measured | None:
    """The newest measurement of the layer in bfloat16 under a uniform routing; None without one.

    It is taken from what the files say, whatever their names. An H200 counts as an H100, which has
    the same processors. Numbers that were wrong and layers that were not measured to the end do not
    count.
    """
    devices = GOAL_DEVICES if machine.name in GOAL_DEVICES else (machine.name,)
    wanted = {
        "shape": shape.name,
        "pass": pass_name,
        "implementation": OURS,
        "routing": "uniform",
        "dtype": "bfloat16",
    }
    found: dict[tuple[str, str], Measured] = {}
    for path in (folder or RESULTS).glob("*.json"):
        results = json.loads(path.read_text())
        if (
            not isinstance(results, dict)
            or not {"date", "device", "rows", "jobs"} <= results.keys()
        ):
            continue
        device = results["device"]["name"]
        done = {job["job"] for job in results["jobs"] if job["outcome"] == "done"}
        if (
            not any(name in device for name in devices)
            or Job(CASE, shape, "uniform").name not in done
        ):
            continue
        for row in results["rows"]:
            is_it = all(row.get(name) == value for name, value in wanted.items())
            if is_it and row.get("agrees") is not False and row.get("ms"):
                found[results["date"], path.name] = Measured(float(row["ms"]), device)
    return found[max(found)] if found else None


def print_estimates(
    shapes: tuple[Shape, ...], machines: tuple[Machine, ...], blocks: list[str], console: "Console"
) -> None:
    """A table a shape and machine: every pass and its kernels, or, with ``blocks``, the kernels of
    those rows before and after.

    Raises:
        EstimateError: Triton is missing, or ``blocks`` cannot be read.
    """
    if find_spec("triton") is None:
        raise EstimateError(
            "--estimate compiles the kernels and needs Triton: pip install 'triton>=3.6,<3.10' "
            "(Linux)"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise EstimateError(
            "--estimate cannot compile kernels while TRITON_INTERPRET=1 has them interpreted; "
            "unset it"
        )
    for machine in machines:
        for shape in shapes:
            table = _empty(
                f"[bold]{shape.name}[/] {shape.sizes} in bf16 on one {machine.name}: a model, not "
                "a measurement"
            )
            wanted = [changed(shape, text, machine) for text in blocks]
            with console.status(f"compiling for {machine.chip.name}"):
                for text, (product, row) in zip(blocks, wanted, strict=True):
                    for label, candidate in (
                        ("as it is", None),
                        (text.removeprefix(product).strip(), row),
                    ):
                        table.add_row(product, label, style="bold")
                        _add(table, with_blocks(shape, machine, product, candidate))
                for pass_name in () if wanted else PASSES_SHOWN:
                    kernels = list(pass_estimate(shape, pass_name, machine))
                    table.add_row(*_summary(shape, pass_name, machine, kernels), style="bold")
                    _add(table, kernels)
            console.print(table)
    console.print(
        "an SM: programs that one holds, by registers, shared memory and warps. B/clk: bytes a "
        "clock and SM from L2 that would keep "
        "the tensor cores busy; to be had are "
        f"{', '.join(f'{m.l2_rate:.0f} ({m.name})' for m in machines)}. µs of one program alone: "
        "tensor cores, L2, and what nothing of its own hides. Assumptions: bench/static_model.py.",
        highlight=False,
    )


def _empty(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("kernel")
    table.add_column("tile / warps / stages", min_width=14)
    for column in ("regs", "an SM", "waves", "B/clk", "µs", "limit", "ms"):
        table.add_column(column, justify="right", no_wrap=column == "µs")
    return table


def _add(table: Table, kernels: list[KernelEstimate]) -> None:
    for k in kernels:
        cells = [""] * 6
        if k.finding and k.model:
            tile = f"{k.finding.tile}/{k.finding.warps}/{k.finding.stages}"
            times = f"{k.model.tensor:.1f} {k.model.l2:.1f} {k.model.serial:.1f}"
            cells = [
                tile,
                str(k.finding.registers),
                str(k.model.resident),
                f"{k.model.waves:.1f}",
                f"{k.model.l2_needed:.0f}",
                times,
            ]
        table.add_row(f"  {k.kernel}", *cells, f"{k.limit:.3f}", f"{k.ms:.3f}")


def _summary(
    shape: Shape, pass_name: str, machine: Machine, kernels: list[KernelEstimate]
) -> tuple[str, ...]:
    flops = needed_flops(shape, pass_name) * 1e-9
    ms, limit = sum(k.ms for k in kernels), sum(k.limit for k in kernels)
    rates = f"{flops / ms:.0f} of {flops / limit:.0f} TFLOP/s"
    if found := measured(shape, pass_name, machine):
        rates += f", measured {flops / found.ms:.0f} ({found.device})"
    return pass_name, rates, *[""] * 5, f"{limit:.3f}", f"{ms:.3f}"
