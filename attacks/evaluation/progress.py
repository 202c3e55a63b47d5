"""How far an evaluation is, and how long it will take."""

from typing import NamedTuple


class Progress(NamedTuple):
    """How far this process is.

    decided: (image, attack) pairs that are settled; total: of them, about, None while the data has
    no known length; attacks: how many an image goes through; fresh: pairs settled in this run,
    without those a journal knew; seconds, forwards: of this run
    """

    decided: int
    total: int | None
    attacks: int
    fresh: int
    seconds: float
    forwards: int

    @property
    def images_per_second(self) -> float:
        """Through all attacks, in this run."""
        return self.fresh / self.attacks / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far, which is too high as long as mostly easy images are decided; None
        without a total, or without a rate."""
        if self.total is None or not self.fresh:
            return None
        return max(self.total - self.decided, 0) * self.seconds / self.fresh
