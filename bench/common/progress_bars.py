"""The progress bars of every command."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column


def progress_bars(
    console: Console,
    *,
    time_left: bool = True,
    only_on_terminals: bool = False,
    transient: bool = False,
) -> Progress:
    """Bars that show a description, how many of how many are done, and a note.

    Args:
        time_left: also show an estimate of the time that is left.
        only_on_terminals: show nothing where the output goes to a file.
        transient: the bars disappear when they are done.

    Each task needs a field ``note``: ``bars.add_task("train", total=10, note="")``.
    """
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        # In a narrow terminal the note goes on in the next line, and the count stays whole.
        TextColumn("{task.fields[note]}", markup=False, table_column=Column()),
    ]
    if time_left:
        columns.append(TimeRemainingColumn())

    hidden = only_on_terminals and not console.is_terminal
    return Progress(*columns, console=console, disable=hidden, transient=transient)
