"""Which part of an attack's effect comes through which part of a model."""

from functools import partial
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.claims.parts.words import listed, number
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.parts.captions import (
    between,
    in_trainings,
    means,
    of_runs,
    sentences,
)
from ironmoe.bench.study.report.figures.parts.dots import strokes
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.groups import few
from ironmoe.bench.study.report.figures.parts.looks import BLACK
from ironmoe.bench.study.report.figures.parts.panels import Panel, draw_panels
from ironmoe.bench.study.report.runs import StudyRuns

FREE = "free"
NAMES = {
    "auxiliary": "also ascends balance losses",
    "frozen": "routing frozen in the search",
    "gates": "gradient through gates alone",
    "experts": "gradient through experts alone",
    "replayed": "free; routing of clean image replayed",
}
REROUTED = "rerouted"
ROWS = {FREE: "free"} | NAMES | {REROUTED: "clean; routing of attacked image"}
"""The last one is no attack on pixels, so that it is compared with no other."""
HEIGHT = 2.5  # of a panel, in inches


def draw(runs: StudyRuns) -> Figure | None:
    """The accuracy under each, and its difference to that under the free attack."""
    return draw_panels(
        [
            [
                Panel(f"{training}: accuracy", partial(_accuracies, runs, training)),
                Panel(
                    f"{training}: against the free attack", partial(_differences, runs, training)
                ),
            ]
            for training in runs.trainings
        ],
        height=HEIGHT,
    )


def _accuracies(runs: StudyRuns, training: str, axes: Axes) -> bool:
    of_arms = {
        arm: {
            label: [100 * v for v in _values(runs, training, arm, mode).values()]
            for mode, label in ROWS.items()
        }
        for arm in few(runs.arms)
    }
    axes.set_xlabel("accuracy in %")
    return strokes(axes, list(ROWS.values()), of_arms)


def _differences(runs: StudyRuns, training: str, axes: Axes) -> bool:
    of_arms = {
        arm: {label: against_free(runs, training, arm, mode) for mode, label in NAMES.items()}
        for arm in few(runs.arms)
    }
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.set_xlabel("accuracy − accuracy under the free attack, in points")
    return strokes(axes, list(ROWS.values()), of_arms, named=False)


def against_free(runs: StudyRuns, training: str, arm: Arm, mode: str) -> list[float]:
    """Accuracy under an attack minus that under the free one, in points, of each run."""
    free = _values(runs, training, arm, FREE)
    other = _values(runs, training, arm, mode)
    return [100 * (other[seed] - free[seed]) for seed in other if seed in free]


def _values(runs: StudyRuns, training: str, arm: Arm, mode: str) -> dict[int, float]:
    return runs.values(training, arm, runs.at_radius(training, mode))


def caption(runs: StudyRuns) -> str:
    """What the attacks are, and the mean differences of the first arm."""

    def differences(training: str) -> str:
        texts = []
        for arm in few(runs.arms):
            found = {mode: against_free(runs, training, arm, mode) for mode in NAMES}
            parts = [f"{mode} {number(fmean(each))}" for mode, each in found.items() if each]
            if parts:
                texts.append(f"{arm.name}: {', '.join(parts)}")
        if not texts:
            return ""
        return f"mean differences in points, {'; '.join(texts)}{_rerouted(runs, training)}"

    images = counted(runs.images_asked("routed_images"), "image")
    return sentences(
        f"Accuracy under PGD on {images} at the radius of the training, whose search sees a part "
        "of the model; the free model judges what it finds. In the last two rows images meet the "
        "routing of others: those of the free attack that of the clean image, and clean images "
        "that of the attacked one.",
        f"Thin strokes are runs ({of_runs(runs)}), marks their means, lines 95 % t intervals over "
        "runs, where there are two or more.",
        f"Drawn: {listed([arm.name for arm in few(runs.arms)])}.",
        in_trainings(runs, differences),
    )


def _rerouted(runs: StudyRuns, training: str) -> str:
    """How many predictions on clean images the routing of the attacked ones changes."""
    key = f"{runs.at_radius(training, REROUTED)}:changed"
    found = means(runs, training, few(runs.arms), key, 100)
    if not found:
        return ""
    return f"; that routing alone changes {between(found, unit=' %')} of the clean predictions"


ROUTED_ATTACKS = StudyFigure(
    name="routed-attacks",
    title="Attacks that know the routing",
    needs=("free",),
    of_experts=True,
    draw=draw,
    caption=caption,
)
