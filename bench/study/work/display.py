"""What the terminal shows while a study runs: a line for each finished piece, and the time that is
left."""

from collections.abc import Callable
from types import TracebackType

from rich.console import Console

from ironmoe.bench.common.durations import in_words
from ironmoe.bench.common.progress_bars import progress_bars
from ironmoe.bench.study.work.plan import Plan
from ironmoe.bench.study.work.worker import TRAINED, Done, Task

MOST_SHOWN = 4  # numbers of an outcome


class StudyDisplay:
    """Inside the block, a bar whose length is the work that is left, in passes of the model."""

    def __init__(self, console: Console, tasks: list[Task], plan: Plan) -> None:
        self.console = console
        self.tasks = tasks
        self.left = dict(plan.left)
        self.bars = progress_bars(console)
        self.task = self.bars.add_task("study", total=round(plan.passes), note="")
        self._done = 0

    def __enter__(self) -> Callable[[Done], None]:
        self.bars.start()
        return self.tell

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def tell(self, done: Done) -> None:
        """Show a finished piece."""
        piece = self.left.pop((done.number, done.what), None)
        self._done += 1
        entry = self.tasks[done.number].entry
        what = "trained" if done.what == TRAINED else done.what
        line = f"{entry.name}: {what} ({in_words(done.seconds)})"
        shown = "; ".join([*done.problems, headline(done.values)] if done.values else done.problems)
        self.bars.console.print(
            f"{line}: {shown}" if shown else line, highlight=False, markup=False, soft_wrap=True
        )
        if piece is not None:
            self.bars.advance(self.task, round(piece.passes))


def headline(values: dict[str, float]) -> str:
    """The first few numbers of an outcome."""
    plain = [name for name in values if name.count(":") < 2 and not name.endswith((":kl",))]
    return ", ".join(f"{name} {values[name]:.3g}" for name in plain[:MOST_SHOWN])
