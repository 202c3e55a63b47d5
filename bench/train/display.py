"""What the terminal shows while a training runs: a bar, and a line for each finished epoch."""

from typing import Any

from rich.console import Console
from rich.progress import Progress as Bars

from ironmoe.bench.common.progress_bars import progress_bars
from ironmoe.bench.train.updates import Progress

MEMORY = 0.95  # of the running means that the bar shows


class Display:
    """The bar of a training. ``trained_on``: what the bar calls the share of images that the model
    told right: "robust" for adversarial ones, "accuracy" for clean ones."""

    def __init__(self, console: Console, *, epochs: int, batches: int, trained_on: str) -> None:
        self.console = console
        self.bars: Bars = progress_bars(console)
        self.epochs = epochs
        self.batches = batches
        self.trained_on = trained_on
        self.task = self.bars.add_task("train", total=epochs * batches, note="")
        self._mean: Progress | None = None

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def batch(self, step: int, now: Progress) -> None:
        """Show the running means after a batch."""
        old = self._mean or now
        self._mean = Progress(
            *(MEMORY * a + (1 - MEMORY) * b for a, b in zip(old, now, strict=True))
        )
        epoch = step // self.batches + 1
        note = (
            f"epoch {epoch}/{self.epochs}  loss {self._mean.loss:.3f}  {self.trained_on} "
            f"{100 * self._mean.accuracy:.1f} %"
        )
        self.bars.update(self.task, completed=step + 1, note=note)

    def epoch(self, numbers: dict[str, Any]) -> None:
        """Print the line of a finished epoch."""
        self.say(epoch_line(numbers, self.epochs))

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.bars.console.print(line, highlight=False, markup=False, soft_wrap=True)


def epoch_line(numbers: dict[str, Any], epochs: int) -> str:
    """The numbers of one epoch in a line."""
    load = ", ".join(
        f"{layer.removesuffix('.mlp')} {100 * share:.0f} %"
        for layer, share in numbers["load"].items()
    )
    one_step = f", one step {100 * numbers['one_step']:.1f} %" if "one_step" in numbers else ""
    return (
        f"epoch {numbers['epoch']:>{len(str(epochs))}}/{epochs}  loss {numbers['loss']:.3f}  "
        f"held out: clean {100 * numbers['clean']:.1f} %, PGD-10 {100 * numbers['robust']:.1f} %"
        + one_step
        + (f"  largest load: {load}" if load else "")
    )
