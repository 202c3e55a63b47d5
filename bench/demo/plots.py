"""The pictures of the demo's report."""

from torch import Tensor

from ironmoe.bench.common.files import slug
from ironmoe.bench.common.radii import exact
from ironmoe.bench.reports.image_strips import image_strip, strip_in_words
from ironmoe.bench.reports.model_results import ModelResults, Spread
from ironmoe.bench.reports.page import Picture
from ironmoe.bench.reports.robust_accuracy import (
    Point,
    Series,
    draw_robust_accuracy,
    series_in_words,
)
from ironmoe.bench.reports.routing_pictures import expert_load, routing_change
from ironmoe.bench.reports.style import COLORS


def draw_all(
    models: list[ModelResults],
    examples: dict[str, dict[str, Tensor]],
    classes: list[str],
    norm: str,
) -> dict[str, Picture]:
    """The pictures by file name.

    Args:
        examples: for each model's name, the images that fell, of ``measure_robust``.
    """
    pictures = {"accuracy.png": _accuracy(models, norm)}

    if routed := [model for model in models if model.layers]:
        pictures["routing_change.png"] = routing_change(routed, "")
        pictures["expert_load.png"] = expert_load(routed, "")

    for model in models:
        if len(examples[model.name]["label"]):
            file = f"examples_{slug(model.name, '_')}.png"
            pictures[file] = _examples(model, examples[model.name], classes)

    return pictures


def _accuracy(models: list[ModelResults], norm: str) -> Picture:
    seeds = len(models[0].runs)
    spread = "the 95 % Wilson interval"
    if seeds > 1:
        spread = f"the mean ± standard deviation of {seeds} seeds"

    series = [
        Series(model.name, color, _point(0.0, model.clean()), _points(model))
        for model, color in zip(models, COLORS, strict=False)
    ]
    return Picture(
        "Accuracy under attack",
        f"Bands and bars: {spread}.",
        draw_robust_accuracy(series, distance=f"{norm}, in 1/255 of the pixel range"),
        series_in_words(series),
    )


def _points(model: ModelResults) -> list[Point]:
    return [_point(eps, model.robust(i)) for i, eps in enumerate(model.eps)]


def _point(eps_255: float, spread: Spread) -> Point:
    return Point(eps_255, spread.mean, *spread.interval)


def _examples(model: ModelResults, shown: dict[str, Tensor], classes: list[str]) -> Picture:
    """Of the first seed."""
    radii = [f"{exact(eps)}/255" for eps in shown["fell_at_255"].tolist()]
    names = [f"test image {number}" for number in shown["number"].tolist()]
    fates = [f"fell at {radius}" for radius in radii]

    seed = f", seed {model.runs[0]['seed']}" * (len(model.runs) > 1)
    return Picture(
        f"Adversarial images of the {model.name}{seed}",
        "Images that fell, from one that fell at the smallest eps to one that held the longest, "
        "each at the eps where it fell. The difference is scaled to its largest entry, which is "
        "written below it; grey is none.",
        image_strip(shown, classes, above=names, below=fates),
        strip_in_words(shown, classes, above=names, below=fates),
    )
