"""The tables of ``ironmoe attack``: what held, eps by eps, and what each attack found and cost; for
the terminal and for the report. ``rows.py`` declares their columns."""

from rich.table import Table

from ironmoe.bench.attack.outcome import EvaluationOutcome
from ironmoe.bench.attack.rows import COST_COLUMNS, RESULT_COLUMNS, WORST_CASE
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.tables import cells, headers, terminal_table


def heading(outcome: EvaluationOutcome) -> list[str]:
    """Lines above the tables."""
    images = counted(outcome.reached, "image")
    return [
        f"{outcome.title} on {images}: {outcome.description}",
        f"clean accuracy {outcome.report.clean_accuracy}",
    ]


def results(outcome: EvaluationOutcome) -> list[tuple[str, list[list[str]]]]:
    """(attack, its cells but for the name, for each eps), the worst case last if there are several
    attacks."""
    names = list(outcome.report.attacks)
    shown = [*names, ""] if len(names) > 1 else names
    return [
        (
            name or WORST_CASE,
            [cells(RESULT_COLUMNS, row)[1:] for row in outcome.rows if row.attack == name],
        )
        for name in shown
    ]


def costs(outcome: EvaluationOutcome) -> list[list[str]]:
    """The cells of a row for each attack."""
    return [cells(COST_COLUMNS, outcome.cost(name)) for name in outcome.report.attacks]


def results_table(outcome: EvaluationOutcome) -> Table:
    """What held, for the terminal. The name of an attack stands in its first row only."""
    table = terminal_table(headers(RESULT_COLUMNS), no_wrap=True)
    for name, rows in results(outcome):
        for number, row in enumerate(rows):
            table.add_row(name if number == 0 else "", *row)
        table.add_section()
    return table


def costs_table(outcome: EvaluationOutcome) -> Table:
    """What each attack found and cost, for the terminal."""
    table = terminal_table(headers(COST_COLUMNS), no_wrap=True)
    for row in costs(outcome):
        table.add_row(*row)
    return table
