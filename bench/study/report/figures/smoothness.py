"""Smoothness over the number of experts."""

from matplotlib.figure import Figure

from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.report.figures.parts.captions import (
    between,
    in_trainings,
    means,
    sentences,
    thin_and_thick,
)
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.groups import on_ladders
from ironmoe.bench.study.report.figures.parts.ladders import Outcome, ladder_figure, over_experts
from ironmoe.bench.study.report.runs import StudyRuns

OUTCOMES = {
    "first-order radius": Outcome("r1", "r₁ in 1/255 (Linf)", is_log=True),
    "least radius found": Outcome("least_eps", "least radius in 1/255 (Linf)", is_log=True),
    "Jacobian": Outcome("jacobian", "‖J‖₂ in logits / pixel range", is_log=True),
}


def draw(runs: StudyRuns) -> Figure | None:
    """A line of panels for each training."""
    return ladder_figure(runs, lambda training: OUTCOMES, over_experts)


def caption(runs: StudyRuns) -> str:
    """What the three numbers are, and where they lie."""

    def ranges(training: str) -> str:
        parts = []
        for name, outcome in OUTCOMES.items():
            found = means(runs, training, on_ladders(runs.arms), outcome.key)
            if found:
                parts.append(f"{name} {between(found, 2)}")
        return "; ".join(parts)

    images = counted(runs.image_count("r1"), "image")
    return sentences(
        f"Means over {images} of the first-order radius r₁, at which the tangent of the logits "
        "changes the class; of the least radius at which an attack found another class, both 0 for "
        "an image that the model gets wrong; and of the spectral norm of the Jacobian, which also "
        "measures how large logits are, so that it compares no two models by itself. Axes are "
        "logarithmic.",
        thin_and_thick(runs),
        in_trainings(runs, ranges),
    )


SMOOTHNESS = StudyFigure(
    name="smoothness-over-e",
    title="Smoothness over the number of experts E",
    needs=("r1",),
    of_experts=True,
    draw=draw,
    caption=caption,
)
