"""What an evaluation by AutoAttack says, in the words of the official code: on the terminal, in a
file, or both."""

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ironmoe.attacks.evaluation.findings.summary import AttackSummary
from ironmoe.attacks.evaluation.progress import Progress
from ironmoe.attacks.evaluation.report import RobustnessReport
from ironmoe.attacks.evaluation.sharding import current_shard


class Log:
    """Lines about one evaluation. Of several processes the first one alone writes.

    Args:
        version: the version of AutoAttack.
        prints: to the terminal.
        path: also appended to this file; None: to none.
        every: how many images lie between two lines about how far it is.
    """

    def __init__(
        self, version: str, prints: bool, path: Path | str | None, *, every: int = 250
    ) -> None:
        shard = current_shard()
        first = shard.rank == 0 and shard.is_first
        self.version = version
        self.prints = prints and first
        self.path = path if first else None
        self.every = every
        self._next = every
        self._knows_clean = False

    @property
    def is_on(self) -> bool:
        """Whether anybody reads it."""
        return self.prints or self.path is not None

    def line(self, text: str) -> None:
        """Print and write one line, at once."""
        if self.prints:
            print(text)
            sys.stdout.flush()
        if self.path is not None:
            with Path(self.path).open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    def begins(self, names: Sequence[str], clean: float | None) -> None:
        """Before the attacks of these names; None: the clean accuracy is not known yet."""
        self._knows_clean = clean is not None
        self.line(f"using {self.version} version including {', '.join(names)}.")
        if clean is not None:
            self.line(f"initial accuracy: {clean:.2%}")

    def tells(self, progress: Progress) -> None:
        """While they run: each image goes through all attacks before it is counted here."""
        if progress.decided < self._next:
            return
        self._next = progress.decided + self.every
        total = "" if progress.total is None else f"/{progress.total}"
        self.line(
            f"{progress.decided}{total} images done, {progress.broken} of {progress.fresh} in this "
            f"run misclassified (total time {progress.seconds:.1f} s)"
        )

    def ends(
        self, norm: str, report: RobustnessReport, summary: AttackSummary, final: Tensor | None
    ) -> None:
        """What is left after each attack, how far images moved, and what looks wrong; ``final`` are
        the images (N, …) that the call returns."""
        counted = max(int((~summary.skipped).sum()), 1)
        held = int((summary.clean_correct & ~summary.skipped).sum())
        if not self._knows_clean:
            self.line(f"initial accuracy: {report.clean_accuracy.value:.2%}")
        for name, fell in summary.fell_to.items():
            held -= fell
            self.line(f"robust accuracy after {name.upper()}: {held / counted:.2%}")

        for flag in report.checks:
            if flag.tripped:
                self.line(f"{flag.name}: {flag.message}")
        self.line(f"max {norm} perturbation: {_farthest(summary):.5f}{_values(final)}")
        robust = summary.robust_accuracy.value
        self.line(f"robust accuracy: {robust:.2%} (total time {report.seconds:.1f} s)")


def _farthest(summary: AttackSummary) -> float:
    """The largest distance of an adversarial image."""
    return float(summary.distance[summary.fell].max()) if bool(summary.fell.any()) else 0.0


def _values(final: Tensor | None) -> str:
    """What the final images hold, if there are any."""
    if final is None or not final.numel():
        return ""
    low, high = (float(end) for end in final.aminmax())
    return f", nan in tensor: {int(final.isnan().sum())}, max: {high:.5f}, min: {low:.5f}"
