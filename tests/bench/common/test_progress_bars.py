"""The progress bars of every command."""

import io

import pytest
from rich.console import Console

from ironmoe.bench.common import progress_bars as module
from ironmoe.bench.common.progress_bars import progress_bars


@pytest.mark.parametrize("width", [50, 80, 120])
def test_how_many_of_how_many_is_whole_in_every_terminal(width):
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    bars = progress_bars(console, time_left=False)
    note = "images, apgd-t, 259k of at most 3.1M passes, about 2 min left (1 s to 5 min)"
    task = bars.add_task("attack", total=12_497, note=note)
    bars.update(task, completed=1_105)

    console.print(bars.get_renderable())
    printed = console.file.getvalue()
    assert "1105/12497" in printed.replace(" ", "")
    assert all(word in printed for word in note.split())


def test_a_file_gets_a_line_now_and_then_and_one_for_each_task_that_ends(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console = Console(width=40, file=io.StringIO())
    with progress_bars(console) as bars:
        first = bars.add_task("train a model  ", total=None, note="")
        for step in range(1, 101):
            now[0] += 1
            bars.update(first, total=100, completed=step, note=f"loss [{step}]")
        second = bars.add_task("attack it", total=5, note="")
        bars.update(second, completed=5)
        bars.update(second, note="done")
    assert console.file.getvalue().splitlines() == [
        *(f"train a model: {step}/100 loss [{step}]" for step in (30, 60, 90, 100)),
        "attack it: 5/5",
    ]


def test_a_file_gets_nothing_of_bars_that_are_for_terminals():
    console = Console(file=io.StringIO())
    with progress_bars(console, only_on_terminals=True) as bars:
        bars.update(bars.add_task("compile", total=1, note=""), completed=1)
    assert bars.disable and not console.file.getvalue()
