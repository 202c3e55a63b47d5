"""The page: what the claims are worth, the figures, and all numbers behind them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ironmoe.bench.common.files import write_atomically
from ironmoe.bench.common.machine.provenance import provenance
from ironmoe.bench.common.machine.sessions import mixed
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.page import data_uri, template
from ironmoe.bench.reports.style import save_picture
from ironmoe.bench.reports.tables import headers
from ironmoe.bench.study.claims.parts.verdict import Verdict
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.arms import arms_table, outcome_tables
from ironmoe.bench.study.report.claims import CONTRASTS, claim_rows
from ironmoe.bench.study.report.facts import StudyFacts
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.panels import FULL_WIDTH
from ironmoe.bench.study.report.figures.table import FIGURES
from ironmoe.bench.study.report.intro import intro
from ironmoe.bench.study.report.limits import limits
from ironmoe.bench.study.report.measured import how, measurements_table
from ironmoe.bench.study.report.runs import StudyRuns
from ironmoe.bench.study.report.smallest import smallest_effects
from ironmoe.bench.study.statistics.measured import Measured

FOLDER = "figures"  # of the PNGs


class ShownFigure(NamedTuple):
    """A figure on the page: its picture, caption and width in % of the page, or why it is not
    there."""

    title: str
    uri: str
    width: float
    caption: str
    missing: str


def write_study_report(
    path: Path,
    facts: StudyFacts,
    rows: Sequence[Measured],
    verdicts: Sequence[Verdict],
    arms: Sequence[Arm],
    *,
    figures: Sequence[StudyFigure] = FIGURES,
) -> None:
    """Write path/report.html, one file that holds everything, and the pictures under path/figures.

    Args:
        facts: ``study_facts`` of the study.
        rows: all runs.
        verdicts: of ``claims.table.verdicts``.
        arms: in the order of the study.
        figures: which of them.
    """
    runs = StudyRuns(rows, arms, facts)
    html = template("study.report").render(
        numbers={
            "title": facts.title,
            "settings": facts.settings,
            "versions": facts.versions,
            "sessions": facts.made,
            "mixed": mixed(facts.made),
            "written": provenance()["date"],
        },
        settings=[
            (key, json.dumps(value, ensure_ascii=False)) for key, value in facts.settings.items()
        ],
        facts=facts,
        counted=counted,
        words=[],  # the sections below have them
        pictures=[],
        intro=intro(runs, verdicts),
        claims=claim_rows(verdicts),
        contrast_columns=headers(CONTRASTS),
        limits=limits(runs, verdicts),
        smallest=smallest_effects(verdicts),
        figures=[_shown(figure, runs, path / FOLDER) for figure in figures],
        arms_table=arms_table(runs),
        outcome_tables=outcome_tables(runs),
        measurements=measurements_table(facts),
        how=how(facts),
    )
    write_atomically(path / "report.html", html)


def _shown(figure: StudyFigure, runs: StudyRuns, folder: Path) -> ShownFigure:
    drawn = figure.drawn(runs)
    if drawn is None:
        return ShownFigure(figure.title, "", 0, "", figure.reason(runs))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{figure.name}.png"
    width = 100 * float(drawn.get_size_inches()[0]) / FULL_WIDTH
    save_picture(drawn, file)
    return ShownFigure(figure.title, data_uri(file), min(100, width), figure.caption(runs), "")
