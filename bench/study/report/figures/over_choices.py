"""Robustness over how many experts a token takes."""

from matplotlib.figure import Figure

from ironmoe.bench.study.claims.parts.ladders import choice_ladder
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.over_experts import AREA, outcomes
from ironmoe.bench.study.report.figures.parts.captions import (
    between,
    in_trainings,
    means,
    sentences,
    thin_and_thick,
)
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.ladders import ladder_figure, over_choices
from ironmoe.bench.study.report.runs import StudyRuns


def draw(runs: StudyRuns) -> Figure | None:
    """A line of panels for each training."""
    return ladder_figure(runs, lambda training: outcomes(runs, training), over_choices)


def caption(runs: StudyRuns) -> str:
    """What changes along the lines, and the least and the largest mean."""

    def areas(training: str) -> str:
        found = means(runs, training, _drawn(runs, training), AREA.key, 100)
        return f"means over radii are {between(found, unit=' %')}" if found else ""

    drawn = [arm for training in runs.trainings for arm in _drawn(runs, training)]
    of_one = any(arm.top_k == 1 and arm.renormalize for arm in drawn)
    return sentences(
        "Accuracy under PGD over the number K of experts that a token takes, with E fixed. At "
        "equal cost more experts are narrower ones; at equal width the model costs more the larger "
        "K is.",
        thin_and_thick(runs),
        "With K = 1 a gate that sums to 1 is 1: the loss of the task trains no router there."
        if of_one
        else "",
        in_trainings(runs, areas),
    )


def _drawn(runs: StudyRuns, training: str) -> list[Arm]:
    """The arms of all lines, which have two arms at least."""
    arms: list[Arm] = []
    for renormalize in (False, True):
        for equal_width in (False, True):
            ladder = choice_ladder(runs.arms, renormalize=renormalize, equal_width=equal_width)
            measured = [arm for arm in ladder if runs.values(training, arm, AREA.key)]
            arms += measured if len(measured) > 1 else []
    return list(dict.fromkeys(arms))


OVER_CHOICES = StudyFigure(
    name="robustness-over-k",
    title="Robustness over the number of experts that a token takes, K",
    needs=("auc",),
    of_experts=True,
    draw=draw,
    caption=caption,
    wants="pair of arms that differ in K alone",
)
