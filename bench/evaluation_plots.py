"""The pictures of ``ironmoe attack``."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.attacks import Proportion
from ironmoe.bench.evaluation_outcome import Outcome, Shown
from ironmoe.bench.plots import COLORS, STYLE, expert_load, routing_change, strip
from ironmoe.bench.summary import ModelResults

WORST = "#1c2329"  # of the worst case per sample
BINS = 40
ROUNDING = 1e-5  # so that distances of just eps come into one bin
Color = str | tuple[float, float, float, float]


def draw_evaluation(outcome: Outcome) -> dict[str, tuple[str, str, Figure]]:
    """File name → (title, what is seen, picture). What there is nothing to show of is left out."""
    unit = unit_of(outcome.suite.norm)
    figures = {
        "robust_accuracy.png": (
            "Robust accuracy against eps",
            "The share of all images that hold. "
            + (
                "The band is the 95 % Wilson interval of the worst case."
                if _many(outcome)
                else "Bands are 95 % Wilson intervals."
            )
            + (
                " Worst case: an image counts only if it holds against every attack." if len(outcome.report.attacks) > 1 else ""
            ),
            accuracy(outcome),
        )
    }
    if any(bool(summary.fell.any()) for summary in outcome.report.attacks.values()):
        figures["distances.png"] = (
            "Distances of the confirmed adversarial images",
            f"{unit}; dotted lines are the radii. An attack that stops at its first success stays where it "
            "found it, often on the edge of the ball: these are no smallest distances.",
            distances(outcome),
        )
        figures["steps.png"] = (
            "Steps to success",
            "Of the images right from the start, those that had fallen after so many questions of the successful attempt, at the eps "
            "where they fell. A curve still rising at its right end says that more steps would find more.",
            steps(outcome),
        )
    if outcome.margins is not None:
        for file, title, what, shown in (
            ("easiest.png", "The easiest images", "They fell at the smallest eps, the nearest first.", outcome.easiest()),
            (
                "hardest.png",
                "The hardest images",
                "They held against every attack, those with the largest margin left first; then those that fell last. For images that "
                "held, the final image of the attack that came closest is shown.",
                outcome.hardest(),
            ),
        ):
            if shown:
                what += " Perturbations are scaled to their largest entry; grey is none."
                figures[file] = (title, what, images(outcome, shown))
    if outcome.routing:
        results = routing_results(outcome)
        how = f"PGD with {outcome.suite.pgd_steps} steps at its full length, routing free, on {outcome.routing[0]['images']} images."
        figures["routing_change.png"] = ("Routing change against eps", how, routing_change([results]))
        figures["expert_load.png"] = ("Expert load", how, expert_load([results]))
    return figures


def accuracy(outcome: Outcome) -> Figure:
    """One curve an attack from the clean accuracy at eps 0, and the worst case per sample."""
    clean = outcome.report.clean_accuracy
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.8, 4.2))
        for (name, summary), color in zip(outcome.report.attacks.items(), _colors(outcome), strict=True):
            _curve(axes, outcome, [clean, *summary.curve.values()], name, color, "o-", band=not _many(outcome))
        if len(outcome.report.attacks) > 1:
            worst = [clean, *(outcome.worst_case(eps) for eps in outcome.suite.eps_255)]
            _curve(axes, outcome, worst, "worst case", WORST, "--", band=True)
        axes.set(xlabel=f"eps: {unit_of(outcome.suite.norm)} (0 = clean)", ylabel="robust accuracy in %", ylim=(0, 101))
        _legend(axes)
    return figure


def distances(outcome: Outcome) -> Figure:
    """A histogram for each attack that found something, over common bins."""
    found = {name: 255 * s.distance[s.fell].numpy() for name, s in outcome.report.attacks.items()}
    colors = dict(zip(found, _colors(outcome), strict=True))
    found = {name: values for name, values in found.items() if len(values)}
    top = max(values.max() for values in found.values()) or 1.0
    bins = np.linspace(0, top, BINS + 1).tolist()
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(found), sharex=True, sharey=True, squeeze=False, figsize=(6.8, max(2.4, 0.6 + 1.1 * len(found)))
        )
        for axes, (name, values) in zip(grid[:, 0], found.items(), strict=True):
            axes.hist(values * (1 - ROUNDING), bins, color=colors[name], label=f"{name} (median {np.median(values):.3g})")
            for eps in outcome.suite.eps_255:
                axes.axvline(eps, color=WORST, linewidth=0.8, linestyle=":")
            axes.set(ylabel="images", xlim=(0, 1.02 * top))
            axes.legend(fontsize=8, loc="upper left", handlelength=1)
        grid[-1, 0].set_xlabel(f"distance: {unit_of(outcome.suite.norm)}")
    return figure


def steps(outcome: Outcome) -> Figure:
    """Cumulative: the share of the images right from the start that had fallen after so many steps."""
    last = max(int(summary.steps.max()) for summary in outcome.report.attacks.values())
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.8, 3.6))
        for (name, summary), color in zip(outcome.report.attacks.items(), _colors(outcome), strict=True):
            needed = summary.steps[summary.fell].sort().values.numpy()
            share = 100 * np.arange(len(needed) + 1) / int(summary.clean_correct.sum())
            label = f"{name} (median {np.median(needed):.3g})" if len(needed) else name
            axes.step([0, *needed, last], [*share, share[-1]], where="post", color=color, label=label)
        axes.set(xlabel="steps (0: the starting point)", ylabel="images that fell, in %", ylim=(0, 101))
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(-0.1, 1.1 * last + 0.1)
        axes.xaxis.set_major_formatter("{x:g}")
        _legend(axes)
    return figure


def images(outcome: Outcome, shown: list[Shown]) -> Figure:
    """Clean, perturbation, final image of each."""
    rows = [_example(outcome, one) for one in shown]
    figure = strip({key: torch.stack([row[key] for row in rows]) for key in rows[0]}, outcome.classes)
    for axes, one in zip(figure.axes[2 * len(shown) :], shown, strict=True):
        if one.fell_at_255 == float("inf"):
            axes.set_xlabel(f"{one.attack}\nheld", fontsize=8)
        else:
            summary = outcome.report.attacks[one.attack]
            distance, needed = 255 * float(summary.distance[one.number]), int(summary.steps[one.number])
            axes.set_xlabel(f"{one.attack}\n{distance:.3g}/255, {needed} step{'s' * (needed != 1)}", fontsize=8)
    return figure


def unit_of(norm: str) -> str:
    """Of distances in a norm."""
    return f"{norm}, in 1/255 of the pixel range"


def routing_results(outcome: Outcome) -> ModelResults:
    """For the pictures of the demo."""
    run = {
        "attacks": [{"eps_255": eps} for eps in outcome.suite.eps_255],
        "routing": outcome.routing,
        "seed": outcome.suite.seed,
    }
    return ModelResults(outcome.name, [run])


def _curve(axes: Axes, outcome: Outcome, shares: list[Proportion], name: str, color: Color, style: str, band: bool) -> None:
    x = [0.0, *outcome.suite.eps_255]
    axes.plot(x, [100 * share.value for share in shares], style, color=color, label=name, markersize=4)
    if band:
        low, high = zip(*(share.interval() for share in shares), strict=True)
        axes.fill_between(x, 100 * np.array(low), 100 * np.array(high), color=color, alpha=0.13, linewidth=0)


def _example(outcome: Outcome, one: Shown) -> dict[str, torch.Tensor]:
    summary = outcome.report.attacks[one.attack]
    assert summary.adversarial is not None
    return {
        "clean": outcome.images[one.number],
        "adversarial": summary.adversarial[one.number],
        "label": outcome.labels[one.number],
        "prediction": summary.prediction[one.number],
    }


def _colors(outcome: Outcome) -> list[Color]:
    count = len(outcome.report.attacks)
    if not _many(outcome):
        return list(COLORS[:count])
    return [plt.get_cmap("tab10" if count <= 10 else "tab20")(number) for number in range(count)]


def _many(outcome: Outcome) -> bool:
    """More attacks than can be told apart by the usual colours and bands."""
    return len(outcome.report.attacks) > len(COLORS)


def _legend(axes: Axes) -> None:
    """Beside the picture where there are many."""
    if len(axes.get_legend_handles_labels()[1]) > 5:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.legend(fontsize=8)
