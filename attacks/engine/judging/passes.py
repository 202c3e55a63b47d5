"""When the passes of a random model show that an image has reached the goal of an attack.

The model reaches the goal at an image in a share p of its passes, which nobody knows. The verdict
is a one-sided binomial test of p ≤ 1/2. Every candidate of a search is tested, so the levels of the
tests at one image sum up to ``ERROR`` however many there are: the k-th has ERROR · 6 / (π² k²).
"""

import math
from functools import lru_cache

PASSES = 64
"""How often a random model is asked for each verdict."""

ERROR = 0.01
"""The probability that an image counts as one that has reached the goal, although at none of the
points that were tested the model does so in more than half of its passes, is at most this."""


@lru_cache(maxsize=4096)
def hits_needed(passes: int, earlier: int) -> int:
    """How many of so many passes must reach the goal, after ``earlier`` tests at the same image;
    more than there are if no number is enough."""
    if passes == 1:
        return 1
    level = ERROR * 6 / (math.pi * (earlier + 1)) ** 2
    tail = 0
    for hits in range(passes, -1, -1):
        tail += math.comb(passes, hits)
        if tail > level * 2**passes:
            return hits + 1
    return 0


def check_passes(passes: int | None) -> None:
    """TypeError, ValueError: no number, or one that no verdict can rest on."""
    if not isinstance(passes, int | None):
        raise TypeError(f"passes must be None or a whole number, got {passes!r}")
    if passes is not None and passes != 1 and (passes < 16 or passes % 2):
        raise ValueError(f"passes must be 1, or an even number of at least 16, got {passes}")
