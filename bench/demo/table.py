"""The results of the demo as tables, for the terminal and for the report: what held, and how the
attack moved the routing."""

from typing import NamedTuple

from rich.table import Table

from ironmoe.bench.common.radii import exact
from ironmoe.bench.demo.comparison import AT_CHANCE, compare, difference_of, state
from ironmoe.bench.reports.model_results import ModelResults
from ironmoe.bench.reports.tables import terminal_table

NO_DIFFERENCE = "–"


class Row(NamedTuple):
    """label: on the left; cells: one for each model; difference: of the first model to the
    second."""

    label: str
    cells: list[str]
    difference: str


def columns(models: list[ModelResults]) -> list[str]:
    """What stands above the columns of ``rows``."""
    names = [model.name for model in models]
    return ["", *names, f"{names[0]} − {names[1]}"]


def rows(models: list[ModelResults]) -> list[Row]:
    """The verdict is the first row."""
    first, second = models
    runs = [model.runs[0] for model in models]
    robust = [
        Row(f"robust, {exact(at.eps_255)}/255", [str(m.robust(i)) for m in models], at.text)
        for i, at in enumerate(compare(first, second))
    ]
    return [
        Row("verdict", [state(m) for m in models], _verdict(first, second)),
        Row("checks", [_checks(m) for m in models], NO_DIFFERENCE),
        Row(
            "clean",
            [str(m.clean()) for m in models],
            difference_of(first.clean(), second.clean()),
        ),
        *robust,
        Row("FLOPs per image", [f"{run['flops'] / 1e6:.3f} M" for run in runs], NO_DIFFERENCE),
        Row("parameters", [f"{run['parameters'] / 1e3:.0f} k" for run in runs], NO_DIFFERENCE),
        Row("images/s clean", [f"{m.forward_speed():.0f}" for m in models], NO_DIFFERENCE),
        Row("images/s attack", [f"{m.attack_speed():.0f}" for m in models], NO_DIFFERENCE),
    ]


def _verdict(first: ModelResults, second: ModelResults) -> str:
    if AT_CHANCE in (state(first), state(second)):
        return "none"
    if len(first.runs) == 1:
        return "open: one seed"
    return "different" if any(at.decided for at in compare(first, second)) else "none shown"


def _checks(model: ModelResults) -> str:
    counts = model.counted_checks
    looked_at = counts["tripped"] + counts["passed"]
    if counts["tripped"]:
        return f"{counts['tripped']} of {looked_at} tripped"
    return f"{looked_at} passed"


def routing_columns(model: ModelResults) -> list[str]:
    """What stands above the columns of ``routing_rows``."""
    return ["eps/255", *(head for layer in model.layers for head in _heads(layer))]


def _heads(layer: str) -> tuple[str, str]:
    name = layer.removesuffix(".mlp")
    return f"{name}: rerouted", f"{name}: busiest expert"


def routing_rows(model: ModelResults) -> list[list[str]]:
    """A row for clean images, and one for each eps: in each layer the share of chosen experts that
    changed, and how many times its even share the busiest expert has; means over seeds."""
    places: list[tuple[str, int | None]] = [("clean", None)]
    places += [(exact(eps), i) for i, eps in enumerate(model.eps)]
    return [
        [label, *(cell for layer in model.layers for cell in _layer_cells(model, layer, at))]
        for label, at in places
    ]


def _layer_cells(model: ModelResults, layer: str, at: int | None) -> tuple[str, str]:
    changed = "–" if at is None else f"{100 * model.routing_change(layer, at):.1f} %"
    return changed, f"{model.imbalance(layer, at):.1f} × even"


def as_table(models: list[ModelResults], title: str) -> Table:
    """What held, for the terminal."""
    table = terminal_table(columns(models), title=title)
    table.columns[0].style = "bold"
    for row in rows(models):
        table.add_row(row.label, *row.cells, row.difference)
    return table


def routing_table(models: list[ModelResults]) -> Table | None:
    """How the attack moved the routing, for the terminal; None if no model has routing that was
    measured."""
    routed = next((model for model in models if model.layers), None)
    if routed is None:
        return None
    table = terminal_table(routing_columns(routed), title=f"Routing of the {routed.name}")
    for cells in routing_rows(routed):
        table.add_row(*cells)
    return table
