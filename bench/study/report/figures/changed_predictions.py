"""How much other choices of experts change what a model says of images, clean ones and those of
PGD."""

from functools import partial
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.bench.study.claims.parts.words import number
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.interventions import (
    IMAGES,
    OWN,
    height,
    names,
    what_is_drawn,
)
from ironmoe.bench.study.report.figures.parts.captions import in_trainings, sentences
from ironmoe.bench.study.report.figures.parts.dots import strokes
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.groups import few
from ironmoe.bench.study.report.figures.parts.panels import Panel, draw_panels
from ironmoe.bench.study.report.runs import StudyRuns

CHANGED, DIVERGENCE = "changed", "kl"
TITLES = {CHANGED: "changed predictions", DIVERGENCE: "divergence"}
LABELS = {CHANGED: "predictions changed, in %", DIVERGENCE: "KL divergence in nats"}
SCALES = {CHANGED: 100.0, DIVERGENCE: 1.0}
EDGE = 0.03  # of the axis, so that a mark at 0 is whole
ROUNDING = 1e-9  # a smaller divergence is one of equal logits, and counts as 0


def draw(runs: StudyRuns) -> Figure | None:
    """A line of two panels for each training and kind of images."""
    return draw_panels(
        [
            [
                Panel(f"{training}, {of}: {title}", partial(_panel, runs, training, images, kind))
                for kind, title in TITLES.items()
            ]
            for training in runs.trainings
            for images, of in IMAGES.items()
        ],
        height=height(runs),
    )


def _panel(runs: StudyRuns, training: str, images: str, kind: str, axes: Axes) -> bool:
    rows = names(runs, training)
    of_arms = {
        arm: {name: _changes(runs, training, arm, f"{name}:{images}:{kind}") for name in rows}
        for arm in few(runs.arms)
    }
    drawn = strokes(axes, rows, of_arms, is_log=kind == DIVERGENCE, named=kind == CHANGED)
    axes.set_xlabel(LABELS[kind])
    if kind == CHANGED:
        axes.set_xlim(left=-EDGE * axes.get_xlim()[1])  # an interval may reach below, no share
    return drawn


def _changes(runs: StudyRuns, training: str, arm: Arm, key: str) -> list[float]:
    scale = SCALES[key.rpartition(":")[2]]
    found = runs.values(training, arm, key).values()
    return [scale * value if value > ROUNDING else 0.0 for value in found]


def caption(runs: StudyRuns) -> str:
    """What is drawn, and the largest mean of each arm."""

    def largest(training: str) -> str:
        texts = []
        for arm in few(runs.arms):
            changes = {
                name: _changes(runs, training, arm, f"{name}:clean:{CHANGED}")
                for name in names(runs, training)
            }
            found = {name: fmean(values) for name, values in changes.items() if values}
            if found:
                most = max(found, key=found.__getitem__)
                texts.append(f"{arm.name} {number(found[most])} % ({most})")
        return f"most changed predictions on clean images: {', '.join(texts)}" if texts else ""

    return sentences(
        "The share of predictions that other experts or gates change, and the mean KL divergence "
        "of the router's own probabilities from the new ones (logarithmic axis, geometric means; 0 "
        "has no place there).",
        what_is_drawn(runs),
        in_trainings(runs, largest),
    )


CHANGED_PREDICTIONS = StudyFigure(
    name="changed-predictions",
    title="Effect of each intervention on predictions",
    needs=(OWN,),
    of_experts=True,
    draw=draw,
    caption=caption,
)
