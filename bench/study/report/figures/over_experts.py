"""Robustness over the number of experts, with what their gates sum to."""

from matplotlib.figure import Figure

from ironmoe.bench.common.radii import exact
from ironmoe.bench.study.claims.parts.ladders import dense_arm, expert_ladder
from ironmoe.bench.study.claims.parts.words import number
from ironmoe.bench.study.report.figures.parts.captions import (
    in_trainings,
    means,
    sentences,
    thin_and_thick,
)
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.groups import GATES
from ironmoe.bench.study.report.figures.parts.ladders import Outcome, ladder_figure, over_experts
from ironmoe.bench.study.report.runs import StudyRuns

AREA = Outcome("auc", "accuracy in %", 100)
GATE_SUM = Outcome("gate_sum", "sum of the gates of a token")


def draw(runs: StudyRuns) -> Figure | None:
    """A line of panels for each training."""
    return ladder_figure(runs, lambda training: outcomes(runs, training), over_experts)


def outcomes(runs: StudyRuns, training: str) -> dict[str, Outcome]:
    """Title of a panel → what it shows."""
    return robustness(runs, training) | {"scale of the gates": GATE_SUM}


def robustness(runs: StudyRuns, training: str) -> dict[str, Outcome]:
    """The two accuracies under PGD."""
    at = f"PGD at {exact(runs.budget(training).radius)}/255"
    key = runs.at_radius(training, "pgd")
    return {"PGD, mean over radii": AREA, at: AREA._replace(key=key)}


def caption(runs: StudyRuns) -> str:
    """The ends of both ladders, and the scale of the gates there."""
    return sentences(
        "Accuracy under PGD over the number of experts E, all at equal cost; a thin line joins the "
        "models of one seed. The mean over radii is that from the smallest radius to the largest.",
        thin_and_thick(runs),
        "The dotted line is the mean of the dense models. Where the gates of the source weigh less "
        "with more experts, E and the scale of the gates change together; gates that sum to 1 tell "
        "them apart.",
        in_trainings(runs, lambda training: _ends(runs, training)),
    )


def _ends(runs: StudyRuns, training: str) -> str:
    texts = [_of_ladder(runs, training, renormalize) for renormalize in GATES]
    dense = dense_arm(runs.arms)
    if dense is not None:
        area = means(runs, training, [dense], AREA.key, 100)
        texts += [f"dense {number(value)} %" for value in area.values()]
    found = [text for text in texts if text]
    return f"mean over radii {'; '.join(found)}" if found else ""


def _of_ladder(runs: StudyRuns, training: str, renormalize: bool) -> str:
    """The first and the last arm of one ladder."""
    ladder = expert_ladder(runs.arms, renormalize=renormalize)
    area = means(runs, training, ladder, AREA.key, 100)
    if not area or not any(arm.renormalize == renormalize for arm in ladder):
        return ""
    gates = means(runs, training, ladder, GATE_SUM.key)
    texts = [
        f"{number(area[name])} % ({name}"
        + (f", gates sum to {number(gates[name], 2)})" if name in gates else ")")
        for name in area
    ]
    return f"with {GATES[renormalize]} {' and '.join(dict.fromkeys([texts[0], texts[-1]]))}"


OVER_EXPERTS = StudyFigure(
    name="robustness-over-e",
    title="Robustness over the number of experts E",
    needs=("auc",),
    of_experts=True,
    draw=draw,
    caption=caption,
)
