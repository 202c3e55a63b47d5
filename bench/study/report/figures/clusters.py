"""A case that can be computed exactly: linear experts of clusters against one linear model."""

from collections.abc import Sequence
from functools import cache, partial
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.attacks.smoothness import ClusterRow, clusters_experiment
from ironmoe.bench.study.ladder.arms import LADDER
from ironmoe.bench.study.report.figures.parts.captions import sentences
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.lines import run_lines
from ironmoe.bench.study.report.figures.parts.looks import looks
from ironmoe.bench.study.report.figures.parts.panels import Panel, draw_panels
from ironmoe.bench.study.report.runs import StudyRuns

EXPERTS = (2, 4, 8, 16)
ANGLES = (90.0, 75.0, 60.0, 45.0, 30.0)
SEEDS = tuple(range(5))


@cache
def rows(equal_norms: bool) -> tuple[ClusterRow, ...]:
    """All draws, which are the same in every report."""
    return tuple(clusters_experiment(EXPERTS, ANGLES, seeds=SEEDS, equal_norms=equal_norms))


def draw(_: StudyRuns) -> Figure | None:
    """Experts of equal norms, and of others."""
    titles = {True: "experts of equal norm", False: "experts of any norm"}
    return draw_panels(
        [[Panel(title, partial(_ratios, rows(equal))) for equal, title in titles.items()]],
        same_heights=True,
    )


def _ratios(found: Sequence[ClusterRow], axes: Axes) -> bool:
    arms = [LADDER[f"E{experts}"] for experts in EXPERTS]
    for experts, look in zip(EXPERTS, looks(arms).values(), strict=True):
        of_experts = [row for row in found if row.experts == experts]
        by_seed = {seed: [row.ratio for row in of_experts if row.seed == seed] for seed in SEEDS}
        run_lines(axes, list(ANGLES), by_seed, look)
        bounds = [row.bound for row in of_experts if row.seed == SEEDS[0]]
        axes.plot(ANGLES, bounds, color=look.color, linewidth=0.9, linestyle=(0, (1, 1.5)))
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set(
        xlabel="angle between the clusters in degrees", ylabel="Lipschitz constant, dense / MoE"
    )
    return True


def caption(_: StudyRuns) -> str:
    """What is drawn, and what it shows at a right angle."""
    right = [row for row in rows(True) if row.angle == ANGLES[0]]
    means = ", ".join(
        f"{fmean(row.ratio for row in right if row.experts == experts):.2f} with {experts}"
        for experts in EXPERTS
    )
    return sentences(
        "No model of the study: clusters of data in subspaces that meet at one angle, for each a "
        "linear expert, the interpolant of least norm, and one linear model for all. The mixture "
        "never has the larger Lipschitz constant (ratio 1). At 90 degrees the ratio is at most √E; "
        "at other angles the dotted bound √(E / (1 − cos θ)) holds.",
        f"Thin lines are draws ({len(SEEDS)}), thick ones their means.",
        f"At 90 degrees and with experts of equal norm the mean ratio is {means} experts.",
    )


CLUSTERS = StudyFigure(
    name="clusters",
    title="A case that is known exactly: fixed routing, linear experts",
    needs=(),
    of_experts=False,
    draw=draw,
    caption=caption,
)
