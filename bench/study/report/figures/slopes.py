"""Changes of the logits and curvature around images, with free and with frozen routing."""

from functools import partial
from math import nan

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.bench.common.radii import exact
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.claims.parts.ladders import dense_arm
from ironmoe.bench.study.claims.parts.words import number
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.parts.captions import (
    in_trainings,
    means,
    sentences,
    thin_and_thick,
)
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.groups import few
from ironmoe.bench.study.report.figures.parts.ladders import Outcome, over_experts
from ironmoe.bench.study.report.figures.parts.lines import run_lines
from ironmoe.bench.study.report.figures.parts.log_axis import log_axis
from ironmoe.bench.study.report.figures.parts.looks import Look, looks
from ironmoe.bench.study.report.figures.parts.panels import Panel, draw_panels
from ironmoe.bench.study.report.runs import StudyRuns

GATE_SHARE = Outcome("gate_share", "share of ‖J‖ through gates, in %", 100)
SMALLER = 0.6  # marks and lines of frozen routing, so that equal numbers show


def draw(runs: StudyRuns) -> Figure | None:
    """A line of panels for each training."""
    return draw_panels([_line(runs, training) for training in runs.trainings])


def _line(runs: StudyRuns, training: str) -> list[Panel]:
    radius = exact(runs.budget(training).radius)
    label = f"share of γ at {radius}/255, in %"
    share = Outcome(f"gamma@{radius}:share", label, 100)
    over = partial(over_experts, runs=runs, training=training)
    return [
        Panel(f"{training}: largest change, over r", partial(_secants, runs, training)),
        Panel(f"{training}: curvature by rerouting", partial(over, outcome=share)),
        Panel(f"{training}: derivative of the gates", partial(over, outcome=GATE_SHARE)),
    ]


def _secants(runs: StudyRuns, training: str, axes: Axes) -> bool:
    dense = dense_arm(runs.arms)
    arms = [*([] if dense is None else [dense]), *few(runs.arms)]
    drawn = False
    for arm, look in zip(arms, looks(arms).values(), strict=True):
        for routing in ("free", "frozen"):
            drawn = _profile(axes, runs, training, arm, routing, look) or drawn
    axes.set(xlabel="radius r in 1/255 (Linf)", ylabel="largest ‖f(x + d) − f(x)‖₂, over r")
    if drawn:
        radii = runs.radii(training, "slope", ":free")
        log_axis(axes, "x")
        log_axis(axes, "y")
        axes.set_xticks(radii, [f"{radius:.3g}" for radius in radii])
    return drawn


def _profile(
    axes: Axes, runs: StudyRuns, training: str, arm: Arm, routing: str, look: Look
) -> bool:
    radii = runs.radii(training, "slope", f":{routing}")
    keys = [f"slope@{exact(radius)}:{routing}" for radius in radii]
    columns = [runs.values(training, arm, key) for key in keys]
    seeds = sorted({seed for column in columns for seed in column})
    by_seed = {seed: [column.get(seed, nan) for column in columns] for seed in seeds}
    if routing == "frozen":
        look = look._replace(
            label=f"{look.label}, routing frozen",
            dashes=(0, (1, 1)),
            size=SMALLER * look.size,
            width=SMALLER * look.width,
        )
    return run_lines(axes, radii, by_seed, look)


def caption(runs: StudyRuns) -> str:
    """What the three panels are, and how much of the curvature is routing."""

    def shares(training: str) -> str:
        radius = exact(runs.budget(training).radius)
        found = means(runs, training, runs.arms, f"gamma@{radius}:share", 100)
        gates = means(runs, training, runs.arms, "gate_share", 100)
        texts = [
            f"{name} of {arm} {number(of_arm[arm])} %"
            for name, of_arm in (("share of γ", found), ("share of ‖J‖", gates))
            for arm in [each.name for each in few(runs.arms) if each.name in of_arm]
        ]
        return ", ".join(texts)

    images = counted(runs.budget(runs.trainings[0]).swap_images, "image")
    return sentences(
        f"Left: the largest change of the logits within r that a search found, divided by r, mean "
        f"over {images}; flat where a model is smooth, falling like 1 / r where it jumps; frozen: "
        "with the routing of the clean image. Middle: which share of the curvature γ (the local "
        "linearity measure) is gone when routing is frozen; below 0 the search found more with "
        "frozen routing. Right: ‖J − J with constant gates‖ / ‖J‖ of the logits.",
        thin_and_thick(runs),
        in_trainings(runs, shares),
    )


SLOPES = StudyFigure(
    name="slopes",
    title="What routing adds to slopes and curvature",
    needs=("slope", "gamma", "gate_share"),
    of_experts=True,
    draw=draw,
    caption=caption,
)
