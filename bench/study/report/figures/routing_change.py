"""How much the attack of the paper changes the routing of each layer."""

from collections.abc import Sequence
from functools import partial
from math import nan

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.bench.common.radii import exact
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.parts.captions import (
    between,
    in_trainings,
    means,
    sentences,
    thin_and_thick,
)
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.groups import GATES, Group, at_equal_cost
from ironmoe.bench.study.report.figures.parts.lines import run_lines
from ironmoe.bench.study.report.figures.parts.looks import looks
from ironmoe.bench.study.report.figures.parts.panels import Panel, draw_panels
from ironmoe.bench.study.report.runs import StudyRuns
from ironmoe.moe.metrics import READINGS

READING = "kept"
"""Of the three readings the one that nothing but a change makes larger than 0."""

MOST_LAYERS = 4
HEIGHT = 2.3  # of a panel, in inches
FLOOR = "noise"  # the gid of its lines


def draw(runs: StudyRuns) -> Figure | None:
    """A line of panels for each training and kind of gates, a panel for each layer."""
    lines = [
        [
            Panel(
                f"{training}, {group.title}:\n{layer}",
                partial(_panel, runs, training, group, layer),
            )
            for layer in shown_layers(runs, training)
        ]
        for training in runs.trainings
        for group in drawn_groups(runs)
    ]
    return draw_panels([line for line in lines if line], height=HEIGHT, same_heights=True)


def drawn_groups(runs: StudyRuns) -> list[Group]:
    """The ladders of E; arms with another K stand in report.json, unless there are no ladders."""
    groups = at_equal_cost([arm for arm in runs.arms if not arm.is_dense])
    ladders = [group for group in groups if group.title in GATES.values()]
    return ladders or [group for group in groups if group.arms]


def shown_layers(runs: StudyRuns, training: str) -> list[str]:
    """All layers with experts up to four of them, else four from the first to the last."""
    layers = runs.layers(training, f"routing@0:{READING}")
    if len(layers) <= MOST_LAYERS:
        return layers
    return [
        layers[place] for place in np.linspace(0, len(layers) - 1, MOST_LAYERS).round().astype(int)
    ]


def _panel(runs: StudyRuns, training: str, group: Group, layer: str, axes: Axes) -> bool:
    radii = [0.0, *(r for r in runs.radii(training, "routing", f":{READING}:{layer}") if r)]
    drawn = False
    for arm, look in zip(group.arms, looks(group.arms).values(), strict=True):
        rows = _change(runs, training, arm, "routing", layer, radii)
        drawn = run_lines(axes, radii, rows, look) or drawn
        floor = _change(runs, training, arm, "routing noise", layer, radii[1:])
        whole = [row for row in floor.values() if np.isfinite(row).all()]
        if whole and radii[1:]:
            axes.plot(radii[1:], np.mean(whole, 0), ":", color=look.color, linewidth=1, gid=FLOOR)
    axes.set(xlabel="radius eps in 1/255 (Linf)", ylabel="1 − IoU, in %")
    axes.set_xticks(radii, list(map(exact, radii)))
    return drawn


def _change(
    runs: StudyRuns, training: str, arm: Arm, name: str, layer: str, radii: Sequence[float]
) -> dict[int, list[float]]:
    keys = [f"{name}@{exact(radius)}:{READING}:{layer}" for radius in radii]
    columns = [runs.values(training, arm, key) for key in keys]
    seeds = sorted({seed for column in columns for seed in column})
    return {seed: [100 * column.get(seed, nan) for column in columns] for seed in seeds}


def caption(runs: StudyRuns) -> str:
    """What is counted, the floors, and the means over layers at the one radius."""

    def at_radius(training: str) -> str:
        arms = dict.fromkeys(arm for group in drawn_groups(runs) for arm in group.arms)
        radius = exact(runs.budget(training).radius)
        found = [
            means(runs, training, arms, f"{name}@{radius}:{READING}", 100)
            for name in ("routing", "routing noise")
        ]
        texts = [
            f"{between(of_arms, unit=' %')} under {what}"
            for what, of_arms in zip(("the attack", "noise of that size"), found, strict=True)
            if of_arms
        ]
        if not texts:
            return ""
        readings = _other_readings(runs, training, list(arms))
        return f"at {radius}/255 the mean over layers is {' and '.join(texts)}{readings}"

    return sentences(
        "1 − |A ∩ B| / |A ∪ B| of the experts that a token uses on the clean and on the attacked "
        "image, mean over tokens (reading “kept”: tokens that use none both times are left out), "
        "under PGD.vmoe with 40 steps. At 0: the clean images against themselves.",
        thin_and_thick(runs),
        "Dotted, without marks: means under random signs of full length. Both leave the pixel "
        "range.",
        _left_out(runs),
        in_trainings(runs, at_radius),
    )


def _other_readings(runs: StudyRuns, training: str, arms: list[Arm]) -> str:
    """What the attack changes by the other two readings, which a capacity tells apart."""
    at = runs.at_radius(training, "routing")
    found = {reading: means(runs, training, arms, f"{at}:{reading}", 100) for reading in READINGS}
    if all(each == found[READING] for each in found.values()):
        return "; nothing is dropped here, so the readings “realised” and “intended” are the same"
    others = [
        f"“{reading}” {between(each, unit=' %')}"
        for reading, each in found.items()
        if reading != READING and each
    ]
    return f"; by the other readings of the attack {', '.join(others)}" if others else ""


def _left_out(runs: StudyRuns) -> str:
    counts = {len(runs.layers(each, f"routing@0:{READING}")) for each in runs.trainings}
    most = max(counts, default=0)
    if most <= MOST_LAYERS:
        return ""
    return f"{MOST_LAYERS} of {most} layers are drawn; report.json has all."


ROUTING_CHANGE = StudyFigure(
    name="routing-change",
    title="Routing change of each layer over eps",
    needs=("routing",),
    of_experts=True,
    draw=draw,
    caption=caption,
)
