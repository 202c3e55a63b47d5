"""The two tables of ``ironmoe attack``, for the terminal and for the report: what held, and what
each attack found and cost. ``rows.py`` declares their columns."""

from itertools import groupby

from rich.table import Table

from ironmoe.bench.attack.outcome import EvaluationOutcome
from ironmoe.bench.attack.rows import COST_COLUMNS, RESULT_COLUMNS
from ironmoe.bench.attack.words import images_told, told_verdict
from ironmoe.bench.common.radii import told
from ironmoe.bench.reports.tables import cells, headers, terminal_table


def heading(outcome: EvaluationOutcome) -> list[str]:
    """The lines above the tables."""
    return [
        f"{outcome.title} on {images_told(outcome)}: {outcome.description}",
        f"eps ({outcome.suite.norm}): {told(outcome.suite.eps_255)}",
        told_verdict(outcome),
        f"clean accuracy {outcome.report.clean_accuracy}",
    ]


def results(outcome: EvaluationOutcome) -> list[list[str]]:
    """The cells of one row for each attack and eps. The worst case is last; a single attack has
    none."""
    several = len(outcome.report.attacks) > 1
    return [cells(RESULT_COLUMNS, row) for row in outcome.rows if row.attack or several]


def costs(outcome: EvaluationOutcome) -> list[list[str]]:
    """The cells of one row for each attack."""
    return [cells(COST_COLUMNS, outcome.cost(name)) for name in outcome.report.attacks]


def results_table(outcome: EvaluationOutcome) -> Table:
    """The table of what held. The name of an attack stands in its first row only."""
    table = terminal_table(headers(RESULT_COLUMNS))
    for _, rows in groupby(results(outcome), key=lambda row: row[0]):
        for number, (name, *row) in enumerate(rows):
            table.add_row(name if number == 0 else "", *row)
        table.add_section()
    return table


def costs_table(outcome: EvaluationOutcome) -> Table:
    """The table of what each attack found and cost."""
    table = terminal_table(headers(COST_COLUMNS))
    for row in costs(outcome):
        table.add_row(*row)
    return table
