"""All figures of the report, in their order."""

from ironmoe.bench.study.report.figures.certificates import CERTIFICATES
from ironmoe.bench.study.report.figures.changed_predictions import CHANGED_PREDICTIONS
from ironmoe.bench.study.report.figures.clusters import CLUSTERS
from ironmoe.bench.study.report.figures.error_against_dense import ERROR_AGAINST_DENSE
from ironmoe.bench.study.report.figures.error_over_eps import UNDER_PGD, UNDER_THE_PAPERS_ATTACK
from ironmoe.bench.study.report.figures.interventions import INTERVENTIONS
from ironmoe.bench.study.report.figures.over_choices import OVER_CHOICES
from ironmoe.bench.study.report.figures.over_experts import OVER_EXPERTS
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.routed_attacks import ROUTED_ATTACKS
from ironmoe.bench.study.report.figures.routing_change import ROUTING_CHANGE
from ironmoe.bench.study.report.figures.slopes import SLOPES
from ironmoe.bench.study.report.figures.smoothness import SMOOTHNESS
from ironmoe.bench.study.report.figures.swaps import SWAPS
from ironmoe.bench.study.report.figures.top_experts import TOP_EXPERTS

FIGURES: tuple[StudyFigure, ...] = (
    UNDER_PGD,
    ERROR_AGAINST_DENSE,
    UNDER_THE_PAPERS_ATTACK,
    OVER_EXPERTS,
    OVER_CHOICES,
    ROUTING_CHANGE,
    ROUTED_ATTACKS,
    INTERVENTIONS,
    CHANGED_PREDICTIONS,
    TOP_EXPERTS,
    SMOOTHNESS,
    SLOPES,
    SWAPS,
    CERTIFICATES,
    CLUSTERS,
)
"""A new figure is a file with a ``StudyFigure`` and a line here."""
