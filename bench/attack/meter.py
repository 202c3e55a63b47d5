"""How far ``ironmoe attack`` is, and how long its attacks took in all runs of a folder together."""

import time

from rich.console import Console

from ironmoe.attacks import Progress, RobustnessReport
from ironmoe.bench.common.progress_bars import progress_bars
from ironmoe.bench.common.run_folder import RunFolder
from ironmoe.bench.reports.cells import speed

SAVE_SECONDS = 5.0  # the time spent is written to disk this often
LINE_SECONDS = 30.0  # without a terminal for a bar, a line is printed this often
FILE = "results/seconds.json"


class Stopwatch:
    """Counts the seconds that the attacks took in this run.

    The checks before them do not count, and a run in which everything was decided before counts
    none.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, progress: Progress) -> None:
        self.seconds = progress.seconds

    def ended(self, report: RobustnessReport) -> float:
        """The exact seconds, when ``evaluate`` has returned."""
        self.seconds = report.seconds if self.seconds else 0.0
        return self.seconds

    def save(self) -> float:
        """The seconds so far. Only the first process writes them to the folder."""
        return self.seconds


class Meter(Stopwatch):
    """The stopwatch of the first process, which also shows how far the attacks are.

    It sees the progress of its own process only, and assumes that the other processes are as far.
    """

    def __init__(
        self, folder: RunFolder, console: Console, *, world: int, images: int, attacks: int
    ) -> None:
        """world: how many processes there are; images, attacks: how many, in all of them."""
        super().__init__()
        self.folder = folder
        self.console = console
        self.world = world
        self.total = images * attacks
        self.noun = "images" if attacks == 1 else "image × attack pairs"
        self.seconds_before = float((folder.read(FILE) or {}).get("seconds", 0.0))

        self.bars = progress_bars(console, time_left=False, only_on_terminals=True)
        self.task = self.bars.add_task("attack", total=self.total, note=self.noun)
        self.decided = 0
        self.saved = self.printed = time.monotonic()

    def __enter__(self) -> "Meter":
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def __call__(self, progress: Progress) -> None:
        super().__call__(progress)
        self.decided = min(progress.decided * self.world, self.total)
        self.say(_note(progress, self.world))
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def say(self, note: str) -> None:
        """Show a note beside the bar; without a terminal, print it now and then."""
        self.bars.update(self.task, completed=self.decided, note=f"{self.noun}, {note}")
        if self.bars.disable and time.monotonic() - self.printed > LINE_SECONDS:
            self.printed = time.monotonic()
            self.console.print(
                f"attack: {self.decided}/{self.total} {self.noun}, {note}",
                highlight=False,
                markup=False,
            )

    def finish(self, report: RobustnessReport, seconds: float) -> float:
        """Show the bar as it ends.

        seconds: that the slowest process took in this run.

        Returns:
            The seconds of all runs in the folder.
        """
        self.seconds = seconds
        self.decided = sum(int(summary.decided.sum()) for summary in report.attacks.values())
        self.say("done" if report.complete else "budget spent")
        return self.save()

    def save(self) -> float:
        """Write the seconds of all runs so far into the folder, and return them."""
        self.saved = time.monotonic()
        seconds = self.seconds_before + self.seconds
        self.folder.write(FILE, {"seconds": seconds})
        return seconds


def _note(progress: Progress, world: int) -> str:
    if not progress.fresh:
        return "none decided yet in this run"
    note = f"{speed(progress.images_per_second * world)} images/s"
    return note if progress.seconds_left is None else f"{note}, {time_left(progress.seconds_left)}"


def time_left(seconds: float) -> str:
    """The time that is left, rounded: it is a guess."""
    for seconds_in_it, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * seconds_in_it:
            return f"about {seconds / seconds_in_it:.0f} {unit} left"
    return f"about {max(seconds, 1):.0f} s left"
