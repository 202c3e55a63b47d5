"""How far an evaluation is, and how long it will take."""

from typing import NamedTuple


class Progress(NamedTuple):
    """How far this process is.

    decided: how many (image, attack) pairs are settled
    total: about how many such pairs there are; None while the data has no known length
    attacks: how many attacks an image goes through
    fresh: how many pairs were settled in this run, without those that a journal knew
    seconds: how long this run has attacked
    forwards: how many forward passes of single images this run made
    broken: in how many of the fresh pairs the image fell, or was wrong without any attack
    """

    decided: int
    total: int | None
    attacks: int
    fresh: int
    seconds: float
    forwards: int
    broken: int = 0

    @property
    def images_per_second(self) -> float:
        """How many images went through all attacks in a second of this run."""
        return self.fresh / self.attacks / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far, which is too high as long as mostly easy images are decided; None
        without a total, or without a rate."""
        if self.total is None or not self.fresh:
            return None
        return max(self.total - self.decided, 0) * self.seconds / self.fresh
