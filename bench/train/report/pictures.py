"""The curves of a training over its epochs."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ironmoe.bench.common.radii import from_255
from ironmoe.bench.reports.page import Picture
from ironmoe.bench.reports.style import COLORS, STYLE
from ironmoe.bench.train.report.facts import TrainingFacts

Numbers = dict[str, Any]
# Hollow and one inside the other, so that lines of equal numbers do not hide each other.
MARKERS: list[Numbers] = [
    {"marker": shape, "markersize": size, "markerfacecolor": "none"}
    for shape, size in (("o", 10), ("s", 7), ("^", 5), ("D", 3))
]


def draw_training(facts: TrainingFacts) -> dict[str, Picture]:
    """The pictures by file name."""
    note = (
        f"Held-out images are {facts.held_out} images of the training split that were not trained "
        "on. The dashed line marks the epoch whose weights were chosen."
    )
    pictures = {
        "accuracy.png": Picture(
            "Accuracy over epochs", note, _accuracies(facts), _accuracies_in_words(facts)
        ),
        "loss.png": Picture(
            "Loss, radius and learning rate over epochs",
            "The loss is the mean of the epoch; radius and rate are those at its end.",
            _settings(facts),
            f"The loss goes from {facts.curves[0]['loss']:.3g} in the first epoch to "
            f"{facts.curves[-1]['loss']:.3g} in the last of {len(facts.curves)}.",
        ),
    }
    if facts.chosen["load"]:
        even = (
            "An even load would give each of E experts a share of 1 / E; where every token takes "
            "the same expert, it has 1 / K, the most."
        )
        pictures["load.png"] = Picture(
            "Largest load of an expert over epochs", even, _load(facts), _load_in_words(facts)
        )
    return pictures


def _accuracies_in_words(facts: TrainingFacts) -> str:
    """The numbers at the first, the chosen and the last epoch."""
    chosen = facts.training["chosen"]
    names = {"clean": "held out, clean", "robust": f"held out, PGD-10 at {facts.eps}"}
    names["trained_on"] = "trained on"
    epochs = dict.fromkeys([1, chosen, len(facts.curves)])
    parts = []
    for epoch in epochs:
        at = facts.curves[epoch - 1]
        shares = [f"{name} {100 * at[key]:.1f} %" for key, name in names.items() if at[key]]
        mark = " (chosen)" if epoch == chosen else ""
        parts.append(f"Epoch {epoch}{mark}: {', '.join(shares)}.")
    return " ".join(parts)


def _load_in_words(facts: TrainingFacts) -> str:
    first, chosen = facts.curves[0]["load"], facts.chosen["load"]
    parts = [
        f"{layer}: {100 * first[layer]:.1f} % after the first epoch, {100 * share:.1f} % after the "
        "chosen one"
        for layer, share in chosen.items()
    ]
    return f"Share of the busiest expert. {'; '.join(parts)}."


def _accuracies(facts: TrainingFacts) -> Figure:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4))
        trained_on = "clean" if facts.is_standard else "adversarial"
        lines = [
            ("clean", "held out: clean", "-"),
            ("robust", f"held out: PGD-10, {facts.eps}", "-"),
            ("trained_on", f"trained on: {trained_on} images", "--"),
        ]
        if "one_step" in facts.chosen:
            lines.append(("one_step", "held out: one step, at the eps of the epoch", "-"))
        for (key, label, style), color, marker in zip(lines, COLORS, MARKERS, strict=False):
            look: Numbers = {"style": style, "color": color, "label": label, **marker}
            _line(axes, facts, 100 * _column(facts, key), **look)
        _epochs(axes, facts)
        axes.set(ylabel="accuracy in %", ylim=(0, 101))
        axes.legend()
    return figure


def _settings(facts: TrainingFacts) -> Figure:
    """Loss above; radius and rate below, as shares of what each is at most."""
    with plt.rc_context(STYLE):
        figure, (upper, lower) = plt.subplots(2, 1, figsize=(6.4, 5), sharex=True)
        _line(upper, facts, _column(facts, "loss"), color=COLORS[0], label="loss")
        upper.set(ylabel="loss")

        shown = [("rate", "learning rate", facts.settings["recipe"]["learning_rate"])]
        if not facts.is_standard:
            shown.insert(0, ("eps", "eps in 1/255", facts.settings["method"]["eps_255"]))
        for (key, label, full), color in zip(shown, COLORS[1:], strict=False):
            share = _column(facts, key) / (from_255(full) if key == "eps" else full)
            _line(lower, facts, 100 * share, color=color, label=f"{label}, at most {full:g}")
        _epochs(lower, facts)
        upper.axvline(facts.training["chosen"], color="#4a5560", linestyle="--", linewidth=1)
        lower.set(ylabel="% of the largest", ylim=(0, 105))
        lower.legend()
    return figure


def _load(facts: TrainingFacts) -> Figure:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4))
        layers = list(facts.chosen["load"])
        shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.8, len(layers)))
        for layer, shade in zip(layers, shades, strict=True):
            values = [100 * epoch["load"][layer] for epoch in facts.curves]
            _line(axes, facts, np.array(values), color=shade, label=layer)
        _epochs(axes, facts)
        axes.set(ylabel="share of the busiest expert, in %")
        axes.set_ylim(0, min(101, 1.3 * axes.get_ylim()[1]))
        axes.legend()
    return figure


def _line(axes: Axes, facts: TrainingFacts, values: Any, *, style: str = "-", **look: Any) -> None:
    epochs = [epoch["epoch"] for epoch in facts.curves]
    axes.plot(epochs, values, linestyle=style, **{"marker": "o", "markersize": 4, **look})


def _epochs(axes: Axes, facts: TrainingFacts) -> None:
    """The axis of the epochs, and the chosen one."""
    axes.axvline(facts.training["chosen"], color="#4a5560", linestyle="--", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.5, len(facts.curves) + 0.5)
    axes.set_xlabel("epoch")


def _column(facts: TrainingFacts, key: str) -> Any:
    """(epochs,) one number of each epoch; NaN where there was none."""
    return np.array([epoch[key] for epoch in facts.curves], dtype=float)
