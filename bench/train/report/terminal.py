"""The final figures of a training, for the terminal."""

from rich.console import Console

from ironmoe.bench.reports.tables import print_table, terminal_table
from ironmoe.bench.train.report.facts import TrainingFacts
from ironmoe.bench.train.report.words import words


def print_figures(facts: TrainingFacts, console: Console) -> None:
    """Print the table and the words of the report; warnings were printed when they came."""
    table = terminal_table(["", ""], title=facts.title)
    table.show_header = False
    for label, cell in facts.rows:
        table.add_row(label, cell)
    print_table(table, console)
    for line in words(facts)[len(facts.training["warnings"]) :]:
        console.print(line, highlight=False, markup=False)
