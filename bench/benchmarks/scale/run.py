"""``ironmoe bench scale``: from its settings to rows, tables and words."""

import sys
from dataclasses import dataclass

from rich.console import Console

from ironmoe.bench.benchmarks.chosen_shapes import select_shapes
from ironmoe.bench.benchmarks.gpus import Gpu, rates_compared
from ironmoe.bench.benchmarks.scale.layers import KNOWN, LAYERS, Layer, World, layers_of
from ironmoe.bench.benchmarks.scale.links import Links
from ironmoe.bench.benchmarks.scale.models import MODELS, layer_alone
from ironmoe.bench.benchmarks.scale.rows import (
    COST,
    MESH,
    PARTS,
    PAYS,
    Row,
    cost_rows,
    memory_rows,
    mesh_rows,
    pays_rows,
)
from ironmoe.bench.benchmarks.scale.tables import origins_of, print_part, words_of
from ironmoe.bench.benchmarks.scale.times import Machine
from ironmoe.bench.common.choices import chosen_names
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.reports.formats import written_rows


@dataclass(frozen=True)
class ScaleSettings:
    """What the user chose: see the options of the command."""

    parts: str
    shapes: list[str] | None
    tokens: int | None
    shared: int | None
    layers: int | None
    ranks: str
    gpus: int
    imbalance: float
    node: int
    gpu: Gpu
    links: Links


def run_bench_scale(settings: ScaleSettings, console: Console, form: str | None) -> None:
    """Print the parts that are asked for.

    Raises:
        UserError: a part, a shape or a number of ranks is none, or no layer can be spread so.
    """
    chosen = chosen_names("--part", settings.parts, PARTS)
    layers = layers_of(
        select_shapes(settings.shapes, KNOWN, [layer.shape for layer in LAYERS]),
        tokens=settings.tokens,
        shared=settings.shared,
        repeats=settings.layers,
    )
    worlds = _worlds(settings, layers)
    (rates,) = rates_compared((settings.gpu,), peak=False)
    machine = Machine(settings.gpu, rates, settings.links)

    parts = {part: _rows_of(part, settings, layers, worlds, machine) for part in chosen}
    for part, rows in parts.items():
        if not rows:
            console.print(f"{part}: none of --ranks {settings.ranks} divides the experts.")
            continue
        if form is None:
            print_part(part, rows, machine, console)
        console.print(words_of(part), highlight=False)
    if form is not None:
        sys.stdout.write(written_rows([row for rows in parts.values() for row in rows], form))
        sys.stdout.flush()
    console.print(origins_of(worlds[0], machine), highlight=False)


def _rows_of(
    part: str,
    settings: ScaleSettings,
    layers: tuple[Layer, ...],
    worlds: list[World],
    machine: Machine,
) -> list[Row]:
    if part == COST:
        return cost_rows(layers, worlds, machine)
    if part == PAYS:
        return pays_rows(layers, worlds, machine)
    if part == MESH:
        return mesh_rows(layers, settings.gpus, worlds[0], machine)
    models = MODELS if settings.shapes is None else tuple(map(layer_alone, layers))
    if settings.tokens is not None:
        models = tuple(model._replace(tokens=settings.tokens) for model in models)
    return memory_rows(models, worlds, machine)


def _worlds(settings: ScaleSettings, layers: tuple[Layer, ...]) -> list[World]:
    try:
        numbers = [int(text) for text in settings.ranks.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(
            "--ranks must be whole numbers of at least 1, separated by commas, got "
            f"{settings.ranks!r}"
        )
    for layer in layers:
        num_experts = layer.shape.num_experts
        if all(num_experts % number for number in numbers):
            raise UserError(
                f"--ranks must have a divisor of the {num_experts} experts of {layer.shape.name}, "
                f"got {settings.ranks}"
            )
    return [World(number, settings.node, settings.imbalance) for number in numbers]
