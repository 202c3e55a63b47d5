"""What an attack does to the routing of a model with experts, as pictures."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from ironmoe.bench.common.radii import exact
from ironmoe.bench.reports.model_results import ModelResults
from ironmoe.bench.reports.page import Picture
from ironmoe.bench.reports.style import STYLE, WITHOUT_GRID


def routing_change(models: list[ModelResults], note: str) -> Picture:
    """How far the attack moves the routing, at each eps."""
    words = [
        f"{model.name} {layer}: "
        + ", ".join(
            f"{100 * model.routing_change(layer, i):.1f} % at {exact(eps)}/255"
            for i, eps in enumerate(model.eps)
        )
        for model in models
        for layer in model.layers
    ]
    text = f"Share of a token's chosen experts that changed. {'; '.join(words)}."
    return Picture("Routing change against eps", note, draw_routing_change(models), text)


def expert_load(models: list[ModelResults], note: str) -> Picture:
    """The load of each expert, on clean images and at each eps."""
    words = [
        f"{label}: the busiest expert has {max(load):.0f} %, the idlest {min(load):.0f} %"
        for label, load in zip(*_loads(models), strict=True)
    ]
    text = f"Each expert's share of the choices. {'; '.join(words)}."
    return Picture("Expert load", note, draw_expert_load(models), text)


def draw_routing_change(models: list[ModelResults]) -> Figure:
    """Share of a token's chosen experts that changed, per MoE layer."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4))
        lines = [(model, layer) for model in models for layer in model.layers]
        shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.8, len(lines)))
        for (model, layer), shade in zip(lines, shades, strict=True):
            changes = [100 * model.routing_change(layer, i) for i in range(len(model.eps))]
            axes.plot(
                model.eps,
                changes,
                "o-",
                color=shade,
                label=f"{model.name} {layer}",
                markersize=4,
            )
        axes.set(
            xlabel="eps in 1/255",
            ylabel="1 − IoU of chosen experts, in %",
        )
        eps = [0.0, *models[0].eps]
        axes.set_xticks(eps, list(map(exact, eps)))
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend()

    return figure


def draw_expert_load(models: list[ModelResults]) -> Figure:
    """The load of each expert as a heat map.

    Experts are across; layers are down, on clean images and at each eps. The even share has the
    middle colour.
    """
    labels, loads = _loads(models)
    num_experts = len(loads[0])
    size = (max(7, 3 + 0.35 * num_experts), max(3.4, 0.8 + 0.3 * len(loads)))
    even = 100 / num_experts
    top = max(2 * even, max(max(row) for row in loads))

    with plt.rc_context(WITHOUT_GRID):
        figure, axes = plt.subplots(figsize=size)
        picture = axes.imshow(
            loads,
            cmap="RdBu_r",
            norm=TwoSlopeNorm(even, vmin=0, vmax=top),
            aspect="auto",
        )
        _write_loads(axes, loads, even, top)
        axes.set_yticks(range(len(labels)), labels)
        names = [f"expert {expert}" for expert in range(num_experts)]
        axes.set_xticks(range(num_experts), names, rotation=45, ha="right")
        axes.spines[:].set_visible(False)

        # of the training; a model from elsewhere has none that is known
        seed = models[0].runs[0].get("seed")
        axes.set_title("Expert load" if seed is None else f"Expert load, seed {seed}", fontsize=10)
        figure.colorbar(picture, label=f"share of choices in % (even: {even:.1f})", fraction=0.04)
    return figure


def _loads(models: list[ModelResults]) -> tuple[list[str], list[list[float]]]:
    """For each layer and kind of images, a label and the load of each expert in %."""
    labels, loads = [], []
    for model in models:
        images = {"clean": None} | {f"eps {exact(eps)}/255": i for i, eps in enumerate(model.eps)}
        for layer in model.layers:
            for name, at in images.items():
                labels.append(f"{layer}  {name}")
                loads.append([100 * share for share in model.load(layer, at)])
    return labels, loads


def _write_loads(axes: Axes, loads: list[list[float]], even: float, top: float) -> None:
    """Write each load into its cell, in white where the cell is dark."""
    for y, row in enumerate(loads):
        for x, value in enumerate(row):
            dark = not 0.4 * even < value < even + 0.6 * (top - even)
            color = "white" if dark else "black"
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
