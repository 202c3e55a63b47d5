"""The pictures of a report."""

import warnings
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from ironmoe.bench.common.results import ModelResults, exact

COLORS = ("#0b6e99", "#d9622b", "#3f7d3a", "#8a4fa3")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a class may be called $
}


def draw_all(
    models: list[ModelResults],
    examples: dict[str, dict[str, Tensor]],
    classes: list[str],
    eps: float,
    folder: Path,
) -> dict[str, Path]:
    """Write the PNGs and return title → file. ``examples`` maps a model's name to the images of
    ``measure_routing``."""
    figures = {"Accuracy against eps": ("accuracy.png", accuracy(models))}
    routed = [m for m in models if m.layers]
    if routed:
        figures["Routing change against eps"] = ("routing_change.png", routing_change(routed))
        figures["Expert load"] = ("expert_load.png", expert_load(routed))
    for model in models:
        if len(examples[model.name]["label"]):
            title = f"Adversarial images of the {model.name}, eps {exact(eps)}/255"
            figures[title] = (
                f"examples_{_slug(model.name)}.png",
                strip(examples[model.name], classes),
            )
    files = {}
    for title, (name, figure) in figures.items():
        files[title] = folder / name
        save(figure, files[title])
    return files


def save(figure: Figure, file: Path) -> None:
    """Write a PNG and let the picture go. A sign that the font lacks becomes a box, without a
    warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        figure.savefig(file, dpi=130)
    plt.close(figure)


def accuracy(models: list[ModelResults]) -> Figure:
    """Clean accuracy at eps 0 and robust accuracy after it, with its interval as a band."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4))
        for model, color in zip(models, COLORS, strict=False):
            spreads = [model.clean(), *(model.robust(i) for i in range(len(model.eps)))]
            x = [0.0, *model.eps]
            axes.plot(
                x,
                [100 * s.mean for s in spreads],
                "o-",
                color=color,
                label=model.name,
                markersize=4,
            )
            low, high = zip(*(s.interval for s in spreads), strict=True)
            axes.fill_between(
                x, 100 * np.array(low), 100 * np.array(high), color=color, alpha=0.18, linewidth=0
            )
        seeds = len(models[0].runs)
        band = "95 % Wilson interval" if seeds == 1 else f"± standard deviation, {seeds} seeds"
        axes.set(
            xlabel="eps in 1/255 (0 = clean)",
            ylabel="accuracy in %",
            ylim=(0, 101),
            title=f"Accuracy under attack; band: {band}",
        )
        axes.title.set_fontsize(10)
        axes.legend()
    return figure


def routing_change(models: list[ModelResults]) -> Figure:
    """Share of a token's chosen experts that changed, per MoE layer."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4))
        lines = [(model, layer) for model in models for layer in model.layers]
        shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.8, len(lines)))
        for (model, layer), shade in zip(lines, shades, strict=True):
            changes = [0.0, *(100 * model.routing_change(layer, i) for i in range(len(model.eps)))]
            axes.plot(
                [0.0, *model.eps],
                changes,
                "o-",
                color=shade,
                label=f"{model.name} {layer}",
                markersize=4,
            )
        axes.set(
            xlabel="eps in 1/255",
            ylabel="1 − IoU of chosen experts, in %",
            title="How far the attack moves the routing",
        )
        axes.set_ylim(bottom=0)
        axes.title.set_fontsize(10)
        axes.legend()
    return figure


def expert_load(models: list[ModelResults]) -> Figure:
    """Heat map: experts across, clean and adversarial images of each layer down; the even share is
    the middle colour."""
    labels, loads = [], []
    for model in models:
        for layer in model.layers:
            for at, name in (
                (None, "clean"),
                *((i, f"eps {exact(e)}/255") for i, e in enumerate(model.eps)),
            ):
                labels.append(f"{layer}  {name}")
                loads.append([100 * share for share in model.load(layer, at)])
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(
            figsize=(max(7, 3 + 0.35 * len(loads[0])), max(3.4, 0.8 + 0.3 * len(labels)))
        )
        even = 100 / len(loads[0])
        top = max(2 * even, max(max(row) for row in loads))
        picture = axes.imshow(
            loads, cmap="RdBu_r", norm=TwoSlopeNorm(even, vmin=0, vmax=top), aspect="auto"
        )
        for y, row in enumerate(loads):
            for x, value in enumerate(row):
                dark = not 0.4 * even < value < even + 0.6 * (top - even)
                axes.text(
                    x,
                    y,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xticks(
            range(len(loads[0])),
            [f"expert {e}" for e in range(len(loads[0]))],
            rotation=45,
            ha="right",
        )
        axes.spines[:].set_visible(False)
        # of the training; a model from elsewhere has none that is known
        seed = models[0].runs[0].get("seed")
        axes.set_title("Expert load" if seed is None else f"Expert load, seed {seed}", fontsize=10)
        figure.colorbar(picture, label=f"share of choices in % (even: {even:.1f})", fraction=0.04)
    return figure


def strip(examples: dict[str, Tensor], classes: list[str]) -> Figure:
    """Clean image, perturbation (grey is none, scaled to its largest entry), adversarial image;
    predictions above."""
    count = len(examples["label"])
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(3, count, figsize=(1.5 * count + 0.6, 5), squeeze=False)
        for column in range(count):
            clean, adversarial = examples["clean"][column], examples["adversarial"][column]
            delta = adversarial - clean
            scale = 2 * delta.abs().max().clamp_min(1e-12)
            label, prediction = int(examples["label"][column]), int(examples["prediction"][column])
            for row, image in enumerate((clean, 0.5 + delta / scale, adversarial)):
                axes[row, column].imshow(
                    _for_imshow(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
                )
                axes[row, column].set(xticks=[], yticks=[])
                axes[row, column].spines[:].set_visible(False)
            axes[0, column].set_title(_short(classes[label]), fontsize=9)
            color = COLORS[1] if label != prediction else "black"
            axes[2, column].set_title(f"→ {_short(classes[prediction])}", fontsize=9, color=color)
        for row, name in enumerate(("clean", "perturbation", "adversarial")):
            axes[row, 0].set_ylabel(name)
    return figure


def _for_imshow(image: Tensor) -> np.ndarray:
    array = image.float().clamp(0, 1).numpy()
    return array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())
