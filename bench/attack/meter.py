"""How far ``ironmoe attack`` is, and how long its attacks took in all runs of a folder together."""

import math
import time
from collections.abc import Callable

from rich.console import Console

from ironmoe.attacks import Progress, RobustnessReport
from ironmoe.bench.common.durations import left_in_words
from ironmoe.bench.common.progress_bars import LINE_SECONDS, progress_bars
from ironmoe.bench.common.run_folder import RunFolder

SAVE_SECONDS = 5.0  # the time spent is written to disk this often
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
        self.short_noun = "images" if attacks == 1 else "pairs"  # a bar has little room
        self.seconds_before = float((folder.read(FILE) or {}).get("seconds", 0.0))

        self.bars = progress_bars(console, time_left=False, only_on_terminals=True)
        self.task = self.bars.add_task("attack", total=self.total, note=self.short_noun)
        self.decided = 0
        self.saved = self.printed = time.monotonic()

    def __enter__(self) -> "Meter":
        self.save()  # a run that ends before its first answer, too, says how much was asked
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def __call__(self, progress: Progress) -> None:
        super().__call__(progress)
        if progress.fresh:
            self.folder.worked()
        self.decided = min(progress.decided * self.world, self.total)
        self.say(_note(progress, self.world))
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def say(self, note: str) -> None:
        """Show a note beside the bar; without a terminal, print it now and then."""
        self.bars.update(self.task, completed=self.decided, note=f"{self.short_noun}, {note}")
        if self.bars.disable and time.monotonic() - self.printed > LINE_SECONDS:
            self.printed = time.monotonic()
            self.console.print(
                f"attack: {self.decided}/{self.total} {self.noun}, {note}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def finish(self, report: RobustnessReport, seconds: float) -> float:
        """Show the bar as it ends.

        seconds: that the slowest process took in this run.

        Returns:
            The seconds of all runs in the folder.
        """
        self.seconds = seconds
        if seconds:
            self.folder.worked()
        self.decided = sum(int(summary.decided.sum()) for summary in report.attacks.values())
        self.say("done" if report.complete else "budget spent")
        return self.save()

    def save(self) -> float:
        """Write the seconds of all runs so far into the folder, and return them."""
        self.saved = time.monotonic()
        seconds = self.seconds_before + self.seconds
        self.folder.write(FILE, {"seconds": seconds, "pairs": self.total})
        return seconds


def _note(progress: Progress, world: int) -> str:
    """The part at work, the passes of all processes, and the time that is left."""
    notes = [progress.at_work or "clean predictions"]
    if progress.forwards_left is None:
        notes.append(f"{short(progress.forwards * world)} passes")
    else:
        most = (progress.forwards + progress.forwards_left[1]) * world
        bound = "at most" if world == 1 else "about"  # other processes may be elsewhere
        done = short(progress.forwards * world)
        notes.append(f"{done} of {bound} {short(most, math.ceil)} passes")
    if progress.seconds_left is not None:
        notes.append(left_in_words(progress.seconds_left, progress.seconds_expected))
    return ", ".join(notes)


def short(count: int, to_whole: Callable[[float], int] = round) -> str:
    """A count of passes: 950, 12k, 1.2M."""
    if count < 10_000:
        return f"{count}"
    if (thousands := to_whole(count / 1e3)) < 1000:
        return f"{thousands}k"
    return f"{to_whole(count / 1e5) / 10:.1f}M"
