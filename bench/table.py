"""The result as one table on the terminal."""

from rich.table import Table

from ironmoe.bench.results import ModelResults, imbalance


def rows(models: list[ModelResults]) -> list[tuple[str, list[str]]]:
    """(label, one cell a model), as table and report print them. Dense models have a dash where there is no routing."""
    lines = [
        ("forward FLOPs per image", [f"{m.runs[0]['flops'] / 1e6:.2f} M" for m in models]),
        ("parameters", [f"{m.runs[0]['parameters'] / 1e3:.0f} k" for m in models]),
        ("clean accuracy", [str(m.clean()) for m in models]),
    ]
    for i, eps in enumerate(models[0].eps):
        lines.append((f"robust accuracy, eps {eps:g}/255", [str(m.robust(i)) for m in models]))
    lines.append(("attacked images/s", [f"{m.attack_speed():.0f}" for m in models]))
    lines.append(("forward images/s", [f"{m.forward_speed():.0f}" for m in models]))
    for layer in dict.fromkeys(layer for m in models for layer in m.layers):
        for i, eps in enumerate(models[0].eps):
            cells = [f"{100 * m.routing_change(layer, i):.1f} %" if layer in m.layers else "–" for m in models]
            lines.append((f"routing changed (1 − IoU), {layer}, eps {eps:g}/255", cells))
        last = len(models[0].eps) - 1
        for label, at in (("clean", None), (f"eps {models[0].eps[last]:g}/255", last)):
            cells = [_load(m.load(layer, at)) if layer in m.layers else "–" for m in models]
            lines.append((f"expert load %, {layer}, {label}", cells))
    return lines


def _load(load: list[float]) -> str:
    return " ".join(f"{100 * share:.0f}" for share in load) + f" (max/even {imbalance(load):.2f})"


def as_table(models: list[ModelResults], title: str) -> Table:
    table = Table(title=title, title_justify="left", show_lines=False)
    table.add_column("", style="bold")
    for model in models:
        table.add_column(model.name, justify="right")
    for label, cells in rows(models):
        table.add_row(label, *cells)
    return table
