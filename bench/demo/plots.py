"""The pictures of the demo's report."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ironmoe.bench.common.files import slug
from ironmoe.bench.common.radii import exact
from ironmoe.bench.reports.image_strips import image_strip
from ironmoe.bench.reports.model_results import ModelResults
from ironmoe.bench.reports.page import Picture
from ironmoe.bench.reports.routing_pictures import draw_expert_load, draw_routing_change
from ironmoe.bench.reports.style import COLORS, STYLE


def draw_all(
    models: list[ModelResults],
    examples: dict[str, dict[str, Tensor]],
    classes: list[str],
    eps: float,
) -> dict[str, Picture]:
    """The pictures by file name.

    Args:
        examples: for each model's name, the images of ``measure_routing``.
        eps: of the examples, in units of 1/255.
    """
    pictures = {"accuracy.png": Picture("Accuracy against eps", "", accuracy(models))}

    if routed := [model for model in models if model.layers]:
        changes, loads = draw_routing_change(routed), draw_expert_load(routed)
        pictures["routing_change.png"] = Picture("Routing change against eps", "", changes)
        pictures["expert_load.png"] = Picture("Expert load", "", loads)

    for model in models:
        shown = examples[model.name]
        if len(shown["label"]):
            title = f"Adversarial images of the {model.name}, eps {exact(eps)}/255"
            file = f"examples_{slug(model.name, '_')}.png"
            pictures[file] = Picture(title, "", image_strip(shown, classes))

    return pictures


def accuracy(models: list[ModelResults]) -> Figure:
    """Accuracy against eps; at eps 0 it is the clean accuracy. The interval is a band."""
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
