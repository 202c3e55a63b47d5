"""The progress bars of every command."""

import io

import pytest
from rich.console import Console

from ironmoe.bench.common.progress_bars import progress_bars


@pytest.mark.parametrize("width", [50, 80, 120])
def test_how_many_of_how_many_is_whole_in_every_terminal(width):
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    bars = progress_bars(console, time_left=False)
    note = "images, apgd-t, 259k of at most 3.1M passes, 1 s to 5 min left"
    task = bars.add_task("attack", total=12_497, note=note)
    bars.update(task, completed=1_105)

    console.print(bars.get_renderable())
    printed = console.file.getvalue()
    assert "1105/12497" in printed.replace(" ", "")
    assert all(word in printed for word in note.split())
