"""How far two answers of a model to the same images lie apart, where they can move at all."""

import torch
from torch import Tensor

from ironmoe.attacks.ruled_out import BEYOND

# Two answers whose distance, divided by their norm, is larger differ by more than rounding.
DIFFERS = 1e-4
# Only classes count that lie at most so many times the size of the two highest logits below the
# highest: a logit of −10⁴ that marks an impossible class would hide every other number in a norm.
NEAR = 100.0
# Logits of all zeros count as so long, so that they may be divided by.
SHORTEST_LOGITS = 1e-12


def apart(logits: Tensor, other: Tensor) -> Tensor:
    """(B,) float64: the distance of two answers (B, …) or (B,), in units of the first one's norm.

    Logits far below the highest, in both answers, have no part in it: such classes are ruled out.
    Where one answer rules out a class and the other does not, the distance is about 1.
    """
    first, second = (answer.double().reshape(len(answer), -1) for answer in (logits, other))

    # −∞ − (−∞) would be NaN, so the lowest numbers count as the lowest that could matter.
    top = first.amax(1, keepdim=True)
    lowest = top - BEYOND * top.abs().clamp_min(1)
    first = first.maximum(lowest)
    second = second.maximum(lowest)

    counts = _near_the_top(first) | _near_the_top(second)
    difference = torch.where(counts, first - second, 0)
    length = torch.where(counts, first, 0).norm(dim=1)
    return difference.norm(dim=1) / length.clamp_min(SHORTEST_LOGITS)


def _near_the_top(logits: Tensor) -> Tensor:
    """bool: the classes that count; always the two highest."""
    two = logits.topk(min(2, logits.shape[1]), dim=1).values
    size = two.abs().amax(1, keepdim=True).clamp_min(1)
    return logits >= two[:, :1] - NEAR * size
