"""The progress bars of every command, and lines in their place where the output is no terminal."""

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

LINE_SECONDS = 30.0  # without a terminal for a bar, a line is printed this often


def progress_bars(
    console: Console,
    *,
    time_left: bool = True,
    only_on_terminals: bool = False,
    transient: bool = False,
) -> Progress:
    """Bars that show a description, how many of how many are done, and a note. Where the output
    goes to a file, they are lines, one every LINE_SECONDS and one for each task that ends.

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

    if console.is_terminal:
        return Progress(*columns, console=console, transient=transient)
    if only_on_terminals:
        return Progress(console=console, disable=True)
    return _Lines(console=console, disable=True)


class _Lines(Progress):
    """Prints how far its tasks are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._ended: set[TaskID] = set()
        self._printed = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As of every bar, with a line from time to time."""
        super().update(task_id, **changes)
        task = next(each for each in self.tasks if each.id == task_id)
        ends_now = task.finished and task_id not in self._ended
        if not ends_now and time.monotonic() - self._printed < LINE_SECONDS:
            return

        if ends_now:
            self._ended.add(task_id)
        self._printed = time.monotonic()
        total = "?" if task.total is None else f"{task.total:g}"
        line = f"{task.description.strip()}: {task.completed:g}/{total} {task.fields['note']}"
        self.console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
