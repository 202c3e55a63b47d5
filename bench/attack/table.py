"""The tables of ``ironmoe attack``: what held, eps by eps, and what each attack found and cost; for
the terminal and for the report."""

from rich.table import Table

from ironmoe.bench.attack.outcome import Outcome, Row
from ironmoe.bench.common.results import exact, speed

RESULTS = ("attack", "eps/255", "robust accuracy", "fell", "undecided")
COSTS = ("attack", "found", "confirmed", "images/s", "forwards", "backwards")


def heading(outcome: Outcome) -> list[str]:
    """Lines above the tables."""
    images = f"{outcome.reached} image{'s' * (outcome.reached != 1)}"
    return [
        f"{outcome.title} on {images}: {outcome.description}",
        f"clean accuracy {outcome.report.clean_accuracy}",
    ]


def results(outcome: Outcome) -> list[tuple[str, list[list[str]]]]:
    """(attack, the other cells of RESULTS for each eps), the worst case per sample last if there
    are several attacks."""
    names = list(outcome.report.attacks)
    return [
        (name or "worst case", [_cells(outcome, row) for row in outcome.rows if row.attack == name])
        for name in ([*names, ""] if len(names) > 1 else names)
    ]


def costs(outcome: Outcome) -> list[list[str]]:
    """Cells of COSTS, a row an attack."""
    rows = []
    for name in outcome.report.attacks:
        cost = outcome.cost(name)
        rate = "–" if cost.images_per_second is None else speed(cost.images_per_second)
        rows.append(
            [
                name,
                str(cost.found),
                str(cost.confirmed),
                rate,
                str(cost.forwards),
                str(cost.backwards),
            ]
        )
    return rows


def results_table(outcome: Outcome) -> Table:
    """For the terminal."""
    table = _table(RESULTS)
    for name, rows in results(outcome):
        for number, row in enumerate(rows):
            table.add_row(name if number == 0 else "", *row)
        table.add_section()
    return table


def costs_table(outcome: Outcome) -> Table:
    """For the terminal."""
    table = _table(COSTS)
    for row in costs(outcome):
        table.add_row(*row)
    return table


def _table(columns: tuple[str, ...]) -> Table:
    """The first column for names, the others for numbers, none of them broken."""
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _cells(outcome: Outcome, row: Row) -> list[str]:
    known = not row.attack or outcome.decided_something(row.attack)
    robust = f"{row.share} {row.brackets}" if known else "nothing decided"
    return [exact(row.eps_255), robust, str(row.fell), str(row.undecided)]
