"""The result of the demo as one table, for the terminal and for the report."""

from rich.table import Table

from ironmoe.bench.common.radii import exact
from ironmoe.bench.reports.model_results import ModelResults
from ironmoe.bench.reports.tables import terminal_table


def rows(models: list[ModelResults]) -> list[tuple[str, list[str]]]:
    """(label, a cell for each model). A dense model has a dash where there is no routing."""
    eps = models[0].eps
    lines = [
        ("forward FLOPs per image", [f"{m.runs[0]['flops'] / 1e6:.3f} M" for m in models]),
        ("parameters", [f"{m.runs[0]['parameters'] / 1e3:.0f} k" for m in models]),
        ("clean accuracy", [str(m.clean()) for m in models]),
    ]
    lines += [
        (f"robust, eps {exact(radius)}/255", [str(m.robust(i)) for m in models])
        for i, radius in enumerate(eps)
    ]
    lines.append(("forward images/s", [f"{m.forward_speed():.0f}" for m in models]))
    lines.append(("attacked images/s", [f"{m.attack_speed():.0f}" for m in models]))
    listed = ", ".join(exact(radius) for radius in eps)

    for layer in dict.fromkeys(layer for m in models for layer in m.layers):
        name = layer.removesuffix(".mlp")
        changes = [
            [f"{100 * m.routing_change(layer, i):.1f}" for i in range(len(eps))]
            if layer in m.layers
            else []
            for m in models
        ]
        lines.append(
            (f"{name}: % rerouted at eps {listed}", ["  ".join(cells) or "–" for cells in changes])
        )
        for label, at in (("clean", None), (f"eps {exact(eps[-1])}", len(eps) - 1)):
            cells = [_load(m, layer, at) if layer in m.layers else "–" for m in models]
            lines.append((f"{name}: % load per expert, {label}", cells))

    return lines


def _load(model: ModelResults, layer: str, at: int | None) -> str:
    """The share of each expert for one seed; for several, how uneven they are on average."""
    uneven = f"max {model.imbalance(layer, at):.1f}× even"
    if len(model.runs) > 1:
        return f"{uneven}, mean of seeds"
    return " ".join(f"{100 * share:.0f}" for share in model.load(layer, at)) + f"  ({uneven})"


def as_table(models: list[ModelResults], title: str) -> Table:
    """The table for the terminal: a column for each model."""
    table = terminal_table(["", *(model.name for model in models)], title=title)
    table.columns[0].style = "bold"
    for label, cells in rows(models):
        table.add_row(label, *cells)
    return table
